"""The scan of transformers' Mamba-2 and its whole mixer.

Mamba-2 is the recurrence with a scalar decay: C is q and B is k, a head of each for a group of heads of x; x times dt
is v, and A times dt the logarithm of the decay. Its states are transposed.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests.compare.layers import DIM, built, causal_convolution, check_generation, check_layer, rms_norm
from tests.compare.peers import (
    LENGTHS,
    by_chunks,
    by_steps,
    check,
    each_of_ours,
    in_float64,
    peer,
    with_gradients,
    without_kernels,
)
from tests.kernels.linear.cases import draw

mamba2 = peer("transformers.models.mamba2.modeling_mamba2")

HEADS, HEAD_DIM, GROUPS, STATE, CHUNK = 6, 4, 2, 5, 16


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    without_kernels(monkeypatch, mamba2)


def config(**options):
    return mamba2.Mamba2Config(
        hidden_size=DIM,
        expand=HEADS * HEAD_DIM // DIM,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        n_groups=GROUPS,
        state_size=STATE,
        chunk_size=CHUNK,
        num_hidden_layers=2,
        vocab_size=10,
        **options,
    )


def inputs(length):
    case = draw("scalar", length, heads=(GROUPS, GROUPS, HEADS, HEADS), key_dim=STATE, value_dim=HEAD_DIM)
    leaves = {"C": case.q, "B": case.k, "x": case.v, "state": case.state}
    generator = torch.Generator().manual_seed(1)
    leaves["dt"] = torch.randn(2, length, HEADS, generator=generator, dtype=torch.float64)
    for name in ("A", "D", "dt_bias"):
        leaves[name] = torch.randn(HEADS, generator=generator, dtype=torch.float64)
    leaves["A"] = -leaves["A"].exp()
    return leaves, {"o": case.do, "end": case.dend}


@each_of_ours
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 0.9)])
def test_chunked_scan(ours, length, limit):
    leaves, cotangents = inputs(length)

    def theirs(C, B, x, state, dt, A, D, dt_bias):
        out, end = mamba2.mamba2_chunk_scan(
            x, dt, A, B, C, CHUNK, D, dt_bias, state.mT, dt_softplus=True, dt_limit=limit, return_final_states=True
        )
        return out, end.mT

    def written_out(C, B, x, state, dt, A, D, dt_bias):
        dt = F.softplus(dt + dt_bias).clamp(*limit)
        out, end = ours(C, B, x * dt[..., None], dt * A, initial_state=state)
        return out + D[:, None] * x, end

    with in_float64():
        want = with_gradients(theirs, leaves, cotangents)
    check(with_gradients(written_out, leaves, cotangents), want, 1e-11)


def mixer(layer, x, ours):
    """Mamba-2 (Dao and Gu 2024, section 7) from the weights of their layer."""
    inner = HEADS * HEAD_DIM
    gate, mixed, dt = layer.in_proj(x).split([inner, inner + 2 * GROUPS * STATE, HEADS], dim=-1)
    mixed = F.silu(causal_convolution(mixed, layer.conv1d.weight[:, 0], layer.conv1d.bias))
    v, k, q = mixed.split([inner, GROUPS * STATE, GROUPS * STATE], dim=-1)
    v, k, q = v.unflatten(-1, (HEADS, -1)), k.unflatten(-1, (GROUPS, -1)), q.unflatten(-1, (GROUPS, -1))
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.time_step_limit)
    out, _ = ours(q, k, v * dt[..., None], -layer.A_log.exp() * dt)
    out = (out + layer.D[:, None] * v).flatten(2) * F.silu(gate)
    return layer.out_proj(rms_norm(out.unflatten(-1, (GROUPS, -1)), layer.norm).flatten(-2))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 0.9)])
@pytest.mark.parametrize("use_bias", [False, True])
def test_mixer(length, limit, use_bias):
    layer = built(mamba2.Mamba2Mixer, config(time_step_limit=limit, use_bias=use_bias))
    check_layer(lambda layer, x: layer(x), mixer, layer, by_chunks, length)


@pytest.mark.parametrize("prompt", [1, 37])
def test_generation(prompt):
    # Their step does not limit dt, so it is compared where there is no limit.
    settings = config()
    layer, cache = built(mamba2.Mamba2Mixer, settings), mamba2.DynamicCache(config=settings)
    read = partial(layer, cache_params=cache)
    check_generation(read, mixer, layer, partial(by_steps, prompt=prompt), prompt, 5)

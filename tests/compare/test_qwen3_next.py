"""The gated delta rule of transformers' Qwen3-Next and its whole layer.

Queries and keys are normalized, q is scaled by K^-1/2, and key head h serves the value heads from h G on, G of them.
"""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests.compare.layers import DIM, built, causal_convolution, check_generation, check_layer, rms_norm, unit
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
from tests.kernels.linear.cases import draw, named_gates

qwen3_next = peer("transformers.models.qwen3_next.modeling_qwen3_next")

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 6, 5, 7


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    without_kernels(monkeypatch, qwen3_next)


def config():
    return qwen3_next.Qwen3NextConfig(
        hidden_size=DIM,
        linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=VALUE_HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        vocab_size=10,
    )


@each_of_ours
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk_size", [None, 16, 64])
@pytest.mark.parametrize("normalized", [False, True])
def test_gated_delta_rule(ours, length, chunk_size, normalized):
    heads = (KEY_HEADS, KEY_HEADS, VALUE_HEADS, VALUE_HEADS)
    case = draw("delta, scalar", length, heads=heads, key_dim=KEY_DIM, value_dim=VALUE_DIM)
    leaves = {"q": case.q, "k": case.k, "v": case.v, **named_gates(case, case.gates), "state": case.state}

    def theirs(q, k, v, beta, log_decay, state):
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": normalized}
        if chunk_size is None:
            return qwen3_next.torch_recurrent_gated_delta_rule(q, k, v, log_decay, beta, state, **options)
        return qwen3_next.torch_chunk_gated_delta_rule(q, k, v, log_decay, beta, chunk_size, state, **options)

    def written_out(q, k, v, beta, log_decay, state):
        if normalized:
            q, k = unit(q), unit(k)
        return ours(q, k, v, log_decay, beta, scale=KEY_DIM**-0.5, initial_state=state)

    cotangents = {"o": case.do, "end": case.dend}
    with in_float64():
        want = with_gradients(theirs, leaves, cotangents)
    check(with_gradients(written_out, leaves, cotangents), want, 1e-11)


def gated_delta_net(layer, x, ours):
    """Gated DeltaNet (Yang et al. 2025) from the weights of their layer, whose projections are cut by key heads."""
    group = VALUE_HEADS // KEY_HEADS
    projected = layer.in_proj_qkvz(x).unflatten(-1, (KEY_HEADS, -1))
    q, k, v, z = projected.split([KEY_DIM, KEY_DIM, group * VALUE_DIM, group * VALUE_DIM], dim=-1)
    b, a = (gate.flatten(2) for gate in layer.in_proj_ba(x).unflatten(-1, (KEY_HEADS, -1)).chunk(2, dim=-1))
    mixed = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1)
    mixed = F.silu(causal_convolution(mixed, layer.conv1d.weight[:, 0]))
    q, k, v = mixed.split([KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM], dim=-1)
    q, k = (unit(y.unflatten(-1, (KEY_HEADS, -1))) for y in (q, k))
    log_decay = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
    out, _ = ours(q, k, v.unflatten(-1, (VALUE_HEADS, -1)), log_decay, b.sigmoid(), scale=KEY_DIM**-0.5)
    normed = rms_norm(out, layer.norm)
    gated = normed * F.silu(z.reshape(out.shape))
    return layer.out_proj(gated.flatten(2))


@pytest.mark.parametrize("length", LENGTHS)
def test_layer(length):
    layer = built(qwen3_next.Qwen3NextGatedDeltaNet, config())
    check_layer(lambda layer, x: layer(x), gated_delta_net, layer, by_chunks, length)


@pytest.mark.parametrize("prompt", [1, 37])
def test_generation(prompt):
    layer = built(qwen3_next.Qwen3NextGatedDeltaNet, config())
    read = partial(layer, cache_params=qwen3_next.DynamicCache(config=config()))
    check_generation(read, gated_delta_net, layer, partial(by_steps, prompt=prompt), prompt, 5)

"""Kimi delta attention of transformers' Kimi Linear and its whole layer.

The decay of each key channel acts before the delta rule: `S = (I - beta k k^T) diag(alpha) S + beta k v^T`.
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

kimi = peer("transformers.models.kimi_linear.modeling_kimi_linear")

HEADS, HEAD_DIM = 3, 5


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    without_kernels(monkeypatch, kimi)


def config():
    return kimi.KimiLinearConfig(
        hidden_size=DIM,
        linear_num_heads=HEADS,
        linear_head_dim=HEAD_DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        vocab_size=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@each_of_ours
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("chunk_size", [None, 16, 64])
def test_kimi_delta_attention(ours, length, chunk_size):
    case = draw("delta, vector", length, key_dim=HEAD_DIM, value_dim=HEAD_DIM + 2)
    leaves = {"q": case.q, "k": case.k, "v": case.v, **named_gates(case, case.gates), "state": case.state}

    def theirs(q, k, v, beta, log_decay, state):
        if chunk_size is None:
            return kimi.recurrent_kimi_delta_attention(q, k, v, log_decay, beta, state, True)
        return kimi.chunk_kimi_delta_attention(q, k, v, log_decay, beta, chunk_size, state, True)

    def written_out(q, k, v, beta, log_decay, state):
        return ours(q, k, v, log_decay, beta, scale=HEAD_DIM**-0.5, initial_state=state)

    cotangents = {"o": case.do, "end": case.dend}
    with in_float64():
        want = with_gradients(theirs, leaves, cotangents)
    check(with_gradients(written_out, leaves, cotangents), want, 1e-11)


def delta_attention(layer, x, ours):
    """Kimi delta attention (Kimi Linear 2025, section 3) from the weights of their layer."""
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)
    mixed = F.silu(causal_convolution(mixed, layer.conv1d.weight[:, 0]))
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in mixed.chunk(3, dim=-1))
    forget = layer.forget_gate
    steps = F.softplus(forget.f_b_proj(forget.f_a_proj(x)) + forget.dt_bias).unflatten(-1, (HEADS, -1))
    log_decay = -forget.A_log.exp() * steps
    out, _ = ours(unit(q), unit(k), v, log_decay, layer.b_proj(x).sigmoid(), scale=HEAD_DIM**-0.5)
    normed = rms_norm(out, layer.o_norm)
    gate = layer.g_b_proj(layer.g_a_proj(x)).sigmoid()
    return layer.o_proj(normed.flatten(2) * gate)


@pytest.mark.parametrize("length", LENGTHS)
def test_layer(length):
    layer = built(kimi.KimiLinearDeltaAttention, config())
    check_layer(lambda layer, x: layer(x), delta_attention, layer, by_chunks, length)


@pytest.mark.parametrize("prompt", [1, 37])
def test_generation(prompt):
    layer = built(kimi.KimiLinearDeltaAttention, config())
    read = partial(layer, cache_params=kimi.DynamicCache(config=config()))
    check_generation(read, delta_attention, layer, partial(by_steps, prompt=prompt), prompt, 5)

"""The gated delta net of transformers' OLMo Hybrid, where beta reaches 2: it may turn a direction of the state over."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests.compare.layers import DIM, built, causal_convolution, check_generation, check_layer, rms_norm, unit
from tests.compare.peers import LENGTHS, by_chunks, by_steps, peer, without_kernels

olmo = peer("transformers.models.olmo_hybrid.modeling_olmo_hybrid")

HEADS, KEY_DIM, VALUE_DIM = 3, 5, 7


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch):
    without_kernels(monkeypatch, olmo)


def config():
    return olmo.OlmoHybridConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        vocab_size=10,
        pad_token_id=0,
        eos_token_id=1,
    )


def gated_delta_net(layer, x, ours):
    """Gated DeltaNet with negative eigenvalues (Grazzi et al. 2025) from the weights of their layer."""
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)
    mixed = F.silu(causal_convolution(mixed, layer.conv1d.weight[:, 0]))
    parts = mixed.split([HEADS * KEY_DIM, HEADS * KEY_DIM, HEADS * VALUE_DIM], dim=-1)
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in parts)
    log_decay = -layer.A_log.exp() * F.softplus(layer.a_proj(x) + layer.dt_bias)
    out, _ = ours(unit(q), unit(k), v, log_decay, 2 * layer.b_proj(x).sigmoid(), scale=KEY_DIM**-0.5)
    normed = rms_norm(out, layer.o_norm)
    return layer.o_proj(normed.flatten(2) * F.silu(layer.g_proj(x)))


@pytest.mark.parametrize("length", LENGTHS)
def test_layer(length):
    layer = built(olmo.OlmoHybridGatedDeltaNet, config())
    check_layer(lambda layer, x: layer(x), gated_delta_net, layer, by_chunks, length)


@pytest.mark.parametrize("prompt", [1, 37])
def test_generation(prompt):
    layer = built(olmo.OlmoHybridGatedDeltaNet, config())
    read = partial(layer, cache_params=olmo.DynamicCache(config=config()))
    check_generation(read, gated_delta_net, layer, partial(by_steps, prompt=prompt), prompt, 5)

"""The lightning recurrence, its decays and a whole layer against the lightning attention of transformers' MiniMax."""

from functools import partial

import pytest
from torch.nn import functional as F

from longctx.mixers.lightning import log_decays
from tests.compare.layers import DIM, built, check_generation, check_layer, rms_norm
from tests.compare.peers import by_chunks, by_reference, by_steps, peer

minimax = peer("transformers.models.minimax.modeling_minimax")

HEADS, HEAD_DIM, DEPTH = 4, 6, 5


def their_layer(layer):
    config = minimax.MiniMaxConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=DEPTH,
        block_size=16,
        layer_types=["linear_attention"] * DEPTH,
    )
    return built(minimax.MiniMaxLightningAttention, config, layer)


def lightning(layer, x, ours):
    """Lightning attention (MiniMax-01 2025, section 2.2.1) from the weights and the decays of their layer."""
    q, k, v = F.silu(layer.qkv_proj(x)).unflatten(-1, (HEADS, 3 * HEAD_DIM)).split(HEAD_DIM, dim=-1)
    out, _ = ours(q, k, v, -layer.slope_rate.flatten())
    return layer.out_proj(layer.output_gate(x).sigmoid() * rms_norm(out.flatten(2), layer.norm))


@pytest.mark.parametrize("length", [1, 16, 45, 130])
@pytest.mark.parametrize("ours", [by_reference, by_chunks])
def test_layer(length, ours):
    def theirs(layer, x):
        return layer(x, position_embeddings=None, attention_mask=None)[0]

    check_layer(theirs, lightning, their_layer(1), ours, length)


@pytest.mark.parametrize("prompt", [1, 37])
def test_generation(prompt):
    layer, cache = their_layer(1), minimax.MiniMaxCache()

    def read(x):
        return layer(x, position_embeddings=None, attention_mask=None, past_key_values=cache)[0]

    check_generation(read, lightning, layer, partial(by_steps, prompt=prompt), prompt, 5)


@pytest.mark.parametrize("layer", range(DEPTH))
def test_decays_are_theirs(layer):
    # They add 1e-5 to the number of layers, which we do not.
    want = (-their_layer(layer).slope_rate.flatten()).tolist()
    assert log_decays(HEADS, layer, DEPTH) == pytest.approx(want, rel=1e-4, abs=3e-6)

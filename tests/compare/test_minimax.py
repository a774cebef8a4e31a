"""The lightning recurrence and its decays against the lightning attention of transformers' MiniMax."""

import pytest
import torch
from torch.nn import functional as F

from longctx.kernels import reference
from longctx.kernels.linear import linear_attention
from longctx.mixers.lightning import log_decays

minimax = pytest.importorskip(
    "transformers.models.minimax.modeling_minimax",
    reason="pip install 'longctx[compare]' to compare with transformers",
)

HEADS, HEAD_DIM, DEPTH = 4, 6, 5


def their_layer(layer):
    config = minimax.MiniMaxConfig(
        hidden_size=16,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=DEPTH,
        block_size=16,
        layer_types=["linear_attention"] * DEPTH,
    )
    torch.manual_seed(0)
    return minimax.MiniMaxLightningAttention(config, layer).double()


@pytest.mark.parametrize("length", [1, 16, 45])
@pytest.mark.parametrize("function", ["reference", "chunked"])
def test_their_layer_with_our_recurrence_is_their_layer(length, function):
    theirs = their_layer(1)
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = theirs(x, position_embeddings=None, attention_mask=None)[0]
    q, k, v = F.silu(theirs.qkv_proj(x)).unflatten(-1, (HEADS, 3 * HEAD_DIM)).split(HEAD_DIM, dim=-1)
    decays = -theirs.slope_rate.flatten()
    if function == "reference":
        out, _ = reference.linear_recurrence(q, k, v, decays)
    else:
        out, _ = linear_attention(q, k, v, decays)
    got = theirs.out_proj(torch.sigmoid(theirs.output_gate(x)) * theirs.norm(out.flatten(2)))
    # Their decays are made in float32, and their norm is computed in it.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_decays_are_theirs(layer):
    # They add 1e-5 to the number of layers, which we do not.
    want = (-their_layer(layer).slope_rate.flatten()).tolist()
    assert log_decays(HEADS, layer, DEPTH) == pytest.approx(want, rel=1e-4, abs=3e-6)

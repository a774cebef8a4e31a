"""Feature maps of linear attention, against their formulas."""

import pytest
import torch

from longctx.kernels.linear.feature_maps import NON_NEGATIVE
from longctx.layers.feature_maps import Elementwise, Hedgehog, feature_map

FORMULAS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", FORMULAS)
def test_elementwise_maps_equal_their_formulas(name):
    x = draw(2, 3, 2, 5)
    torch.testing.assert_close(Elementwise(name)(x), FORMULAS[name](x), rtol=1e-12, atol=1e-15)


def test_hedgehog_starts_as_a_softmax_of_the_keys_and_their_negatives():
    layer, x = Hedgehog(2, 5).double(), draw(2, 3, 2, 5)
    want = torch.cat([x, -x], dim=-1).softmax(dim=-1)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=0)


def test_hedgehog_has_a_matrix_and_a_bias_per_head():
    layer, x = Hedgehog(2, 3).double(), draw(2, 4, 2, 3)
    layer.weight.data.copy_(draw(2, 3, 3, seed=1))
    layer.bias.data.copy_(draw(2, 3, seed=2))
    got = layer(x)
    for head in range(2):
        y = x[:, :, head] @ layer.weight[head] + layer.bias[head]
        want = torch.cat([y, -y], dim=-1).softmax(dim=-1)
        torch.testing.assert_close(got[:, :, head], want, rtol=1e-12, atol=0)
    assert layer.flops_per_token == 2 * 2 * 3 * 3


@pytest.mark.parametrize(
    ("name", "key_dim"), [("identity", 5), ("relu", 5), ("silu", 5), ("elu1", 5), ("hedgehog", 10)]
)
def test_a_feature_map_comes_with_the_key_dim_of_its_output(name, key_dim):
    layer, dim = feature_map(name, 2, 5)
    x = draw(1, 4, 2, 5).float()
    assert dim == key_dim
    assert layer(x).shape == (1, 4, 2, key_dim)
    # Those that a normalizer may be used with have no negative features; the others do.
    assert bool((layer(x) >= 0).all()) == (name in NON_NEGATIVE)


def test_an_unknown_feature_map_is_refused():
    with pytest.raises(KeyError, match="cosine"):
        feature_map("cosine", 2, 5)

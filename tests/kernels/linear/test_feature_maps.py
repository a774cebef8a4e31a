"""Feature maps of linear attention against their equations."""

import math

import pytest
import torch

from longctx.kernels.linear.feature_maps import ELEMENTWISE, NON_NEGATIVE, elu1, hedgehog, identity

POINTS = [-30.0, -1.5, -1e-3, 0.0, 1e-3, 2.0, 30.0]
EQUATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "elu1": lambda x: x + 1 if x > 0 else math.exp(x),
}


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_every_elementwise_map_has_its_equation_here():
    assert ELEMENTWISE.keys() == EQUATIONS.keys()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_maps_are_their_equations(name):
    got = ELEMENTWISE[name](torch.tensor(POINTS, dtype=torch.float64))
    want = torch.tensor([EQUATIONS[name](x) for x in POINTS], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_non_negative_maps_are_exactly_the_named_ones(name):
    lowest = ELEMENTWISE[name](torch.linspace(-8, 8, 65, dtype=torch.float64)).min()
    assert (lowest >= 0).item() == (name in NON_NEGATIVE)


def test_identity_returns_its_argument_and_elu1_is_one_at_zero():
    x = normal(3)
    assert identity(x) is x
    assert elu1(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_hedgehog_is_a_softmax_over_the_projection_and_its_negative_per_head():
    x, weight, bias = normal(2, 5, 3, 4), normal(3, 4, 4), normal(3, 4)
    got = hedgehog(x, weight, bias)
    assert got.shape == (2, 5, 3, 8)
    for head in range(3):
        y = x[:, :, head] @ weight[head] + bias[head]
        exponentials = torch.cat([y.exp(), (-y).exp()], dim=-1)
        want = exponentials / exponentials.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(got[:, :, head], want, rtol=1e-12, atol=1e-13)


def test_hedgehog_is_non_negative_and_sums_to_one_for_large_inputs():
    x = 1e3 * normal(1, 4, 2, 3)
    got = hedgehog(x, torch.eye(3, dtype=x.dtype).expand(2, 3, 3), torch.zeros(2, 3, dtype=x.dtype))
    assert "hedgehog" in NON_NEGATIVE
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(dim=-1), torch.ones(1, 4, 2, dtype=x.dtype))


def test_hedgehog_in_bfloat16_is_a_float32_softmax_that_is_cast_once():
    x, weight, bias = (normal(*shape, dtype=torch.bfloat16) for shape in ((2, 5, 3, 4), (3, 4, 4), (3, 4)))
    y = (torch.einsum("bthk,hkj->bthj", x, weight) + bias).float()
    got = hedgehog(x, weight, bias)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.cat([y, -y], dim=-1).softmax(dim=-1).bfloat16())


def test_maps_of_no_token_are_empty():
    for function in ELEMENTWISE.values():
        assert function(torch.zeros(1, 0, 2, 3)).shape == (1, 0, 2, 3)
    assert hedgehog(torch.zeros(1, 0, 2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 3)).shape == (1, 0, 2, 6)

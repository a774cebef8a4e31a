"""Router logits: float32, whatever the precision around them."""

import pytest
import torch

from longctx.layers.router import Router, exact_logits


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "logits", "bound"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
    ],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_exact_products_under_autocast_as_well(dtype, logits, bound, autocast):
    x, weight = draw(2, 3, 40, dtype=dtype), draw(5, 40, dtype=dtype, seed=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = exact_logits(x, weight)
    assert got.dtype == logits
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=bound, atol=bound)


def test_a_router_projects_tokens_to_a_logit_per_expert():
    router = Router(4, 6)
    router.weight.data.copy_(draw(6, 4))
    x = draw(2, 3, 4, dtype=torch.float32, seed=1)
    torch.testing.assert_close(router(x), x @ router.weight.T)
    assert router(x).shape == (2, 3, 6)
    assert router.init_std == 0.5
    assert router.flops_per_token == 2 * 4 * 6


def test_a_router_keeps_its_parameters_in_full_precision():
    assert Router(4, 6).full_precision


def test_gradients_reach_the_input_and_the_weight():
    x, weight = draw(1, 2, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(exact_logits, (x, weight))

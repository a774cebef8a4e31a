"""Projections of the chosen (token, head) pairs: as the whole product, masked."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.routed import head_projection as routed_linear
from longctx.kernels.routed.head_projection import (
    project_from_heads,
    project_from_pairs,
    project_to_heads,
    project_to_pairs,
)

HEADS, DIM, HEAD_DIM = 5, 7, 3
CHOICES = {
    "some": lambda shape: torch.rand(shape) < 0.4,
    "none": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "one head": lambda shape: torch.arange(shape[2]).eq(2).expand(shape),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(routed_linear, "BLOCK", 8)


@pytest.mark.parametrize("length", [0, 1, 8, 21])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("function", [project_to_heads, project_from_heads])
def test_equals_the_whole_product_masked(function, choice, length):
    torch.manual_seed(0)
    chosen = CHOICES[choice]((2, length, HEADS))
    shapes = ((2, length, DIM), (HEADS, HEAD_DIM, DIM))
    if function is project_from_heads:
        shapes = ((2, length, HEADS, HEAD_DIM), (HEADS, DIM, HEAD_DIM))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out, (x, weight) = function(*leaves, chosen), leaves
    if function is project_to_heads:
        want = torch.einsum("btd,ekd->btek", x, weight) * chosen[..., None]
    else:
        want = torch.einsum("btev,edv->btd", x * chosen[..., None], weight)
    torch.testing.assert_close(out, want)
    towards = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, towards)
    for grad, ref in zip(got, torch.autograd.grad(want, leaves, towards), strict=True):
        torch.testing.assert_close(grad, ref)


@pytest.mark.parametrize("length", [0, 1, 8, 21])
@pytest.mark.parametrize("choice", CHOICES)
def test_pairs_may_lie_in_any_rows(choice, length):
    torch.manual_seed(0)
    chosen = CHOICES[choice]((2, length, HEADS))
    count = int(chosen.sum()) + 3
    places = torch.full(chosen.shape, -7)
    places[chosen] = torch.randperm(count)[: count - 3]
    x, weight = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, length, DIM), (HEADS, HEAD_DIM, DIM))
    )
    rows, heads = project_to_pairs(x, weight, chosen, places, count), project_to_heads(x, weight, chosen)
    assert torch.equal(rows[places[chosen]], heads[chosen])
    assert torch.equal(rows.count_nonzero(), heads.count_nonzero())
    back = torch.randn(HEADS, DIM, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    got, want = project_from_pairs(rows, back, chosen, places), project_from_heads(heads, back, chosen)
    assert torch.equal(got, want)
    towards = torch.randn_like(want)
    leaves = (x, weight, back)
    for a, b in zip(torch.autograd.grad(got, leaves, towards), torch.autograd.grad(want, leaves, towards), strict=True):
        assert torch.equal(a, b)


def test_only_chosen_pairs_are_multiplied():
    chosen = torch.rand(2, 21, HEADS) < 0.4
    with FlopCounterMode(display=False) as counter:
        project_to_heads(torch.randn(2, 21, DIM), torch.randn(HEADS, HEAD_DIM, DIM), chosen)
    assert counter.get_total_flops() == 2 * int(chosen.sum()) * DIM * HEAD_DIM


@pytest.mark.parametrize("function", [project_to_heads, project_from_heads])
def test_what_does_not_fit_is_named(function):
    chosen = torch.ones(2, 4, HEADS, dtype=torch.bool)
    with pytest.raises(ValueError, match="routed projection: x is"):
        function(torch.zeros(2, 4, 2), torch.zeros(HEADS, 3, 9), chosen)
    with pytest.raises(ValueError, match="do not match: expected chosen bool"):
        function(torch.zeros(2, 4, DIM), torch.zeros(HEADS, 3, DIM), chosen.int())

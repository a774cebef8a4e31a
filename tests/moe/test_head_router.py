"""The routers of heads, against the published equations, and what they do at the edges."""

import pytest
import torch
from torch.nn import functional as F

from longctx.moe.head_router import by_norm, learned
from longctx.parallel.layout import Layout

LAYOUT = Layout((0, 3, 11))


def logits(*widths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 11, width, generator=generator, dtype=torch.float64) for width in widths]


def published(routed, shared, kinds, active):
    """Weights and the balance loss, a token at a time."""
    weights, importance, load = [], 0, 0
    experts = routed.shape[-1]
    for x, s, h in zip(routed.flatten(0, 1), shared.flatten(0, 1), kinds.flatten(0, 1), strict=True):
        p = F.softmax(x, dim=0)
        mask = F.one_hot(p.topk(active).indices, experts).sum(dim=0)
        both = 2 * F.softmax(h, dim=0)
        gates = p * mask / (p * mask).sum() * active
        weights.append(torch.cat([F.softmax(s, dim=0) * len(s) * both[0], gates * both[1]]))
        importance, load = importance + p, load + mask
    tokens = len(weights)
    loss = experts**2 * ((importance / tokens) * (load / tokens)).mean()
    return torch.stack(weights).view(*routed.shape[:2], -1), loss


@pytest.mark.parametrize(("shared", "active"), [(4, 3), (1, 1), (2, 8)])
def test_the_learned_router_is_the_published_one(shared, active):
    drawn = logits(8, shared, 2)
    want, loss = published(*drawn, active)
    routing = learned(*drawn, active, LAYOUT, balance=0.5)
    torch.testing.assert_close(routing.weights, want)
    torch.testing.assert_close(routing.report.loss, 0.5 * loss)
    assert torch.equal(routing.chosen, want[..., shared:] > 0)
    assert torch.equal(routing.report.counts, (want[..., shared:] > 0).sum(dim=(0, 1)))
    p = drawn[0].softmax(dim=-1)
    torch.testing.assert_close(routing.report.entropy, -(p * p.log()).sum())
    assert routing.report.tokens == 22


def test_uniform_logits_give_every_head_that_is_read_the_weight_1():
    routing = learned(*(torch.zeros(2, 11, n) for n in (8, 4, 2)), 3, LAYOUT, balance=1.0)
    assert (routing.weights[..., :4] == 1).all()
    # Of equal heads the first are taken.
    assert torch.equal(routing.weights[..., 4:], torch.tensor([1.0] * 3 + [0.0] * 5).expand(2, 11, 8))
    # The loss of an even load, which one head's share of all tokens cannot fall below.
    torch.testing.assert_close(routing.report.loss, torch.tensor(3.0))


def test_without_shared_heads_nothing_is_read_of_the_kinds():
    routed, shared, kinds = logits(6, 0, 2)
    routing = learned(routed, shared, kinds * float("nan"), 2, LAYOUT)
    want = routed.softmax(dim=-1) * routing.chosen
    torch.testing.assert_close(routing.weights, 2 * want / want.sum(dim=-1, keepdim=True))


def test_by_norm_the_largest_queries_are_read_and_count_1():
    (flat,) = logits(10 * 4)
    q = flat.unflatten(2, (10, 4)).requires_grad_()
    routing = by_norm(q[:, :, 4:].norm(dim=-1), 4, 2, LAYOUT)
    norms = q.detach()[:, :, 4:].norm(dim=-1)
    assert torch.equal(routing.chosen.sum(dim=-1), torch.full((2, 11), 2))
    assert (
        norms.masked_fill(~routing.chosen, float("inf")).amin(-1) >= norms.masked_fill(routing.chosen, 0).amax(-1)
    ).all()
    torch.testing.assert_close(
        routing.weights.detach(), torch.cat([torch.ones(2, 11, 4).bool(), routing.chosen], -1).double()
    )
    # Straight through: the gradient is that of the softmax of norms over their standard deviation, where it is read.
    towards = torch.randn(2, 11, 6, dtype=torch.float64)
    (got,) = torch.autograd.grad((routing.weights[..., 4:] * towards).sum(), q, retain_graph=True)
    scores = q[:, :, 4:].norm(dim=-1)
    soft = (scores / scores.std(dim=-1, keepdim=True)).softmax(dim=-1)
    (want,) = torch.autograd.grad((soft * routing.chosen * towards).sum(), q)
    torch.testing.assert_close(got, want)


def test_one_routed_head_has_no_spread():
    (flat,) = logits(5 * 4)
    routing = by_norm(flat.unflatten(2, (5, 4))[:, :, 4:].norm(dim=-1), 4, 1, LAYOUT)
    assert (routing.weights == 1).all()


@pytest.mark.parametrize(
    ("shape", "active", "words"),
    [
        ((2, 10, 6), 2, "the layout has 11 tokens on this rank"),
        ((2, 11, 6), 7, "7 active of 6 routed heads"),
        ((2, 11, 6), 0, "0 active of 6 routed heads"),
    ],
)
def test_what_does_not_fit_is_named(shape, active, words):
    with pytest.raises(ValueError, match=words):
        learned(torch.zeros(shape), torch.zeros(*shape[:2], 2), torch.zeros(*shape[:2], 2), active, LAYOUT)

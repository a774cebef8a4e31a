"""Experts over ranks, against experts that are computed one by one, of all tokens."""

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist

from longctx.kernels import reference
from longctx.kernels.routed.swiglu import grouped_swiglu
from longctx.moe.expert_router import TokenChoice, choose_experts, scores
from longctx.moe.experts import mixture_of_experts
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis
from longctx.parallel.traffic import count_traffic as counting
from tests.combinations import few, mostly_slow_rows, pairs, pairs_or_everything
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, layout_here

EXPERTS, DIM, HIDDEN = 8, 6, 5
BOUNDS = [*PACKINGS.values(), *UNEVEN.values()]
LOGITS = {
    "of chance": lambda x: x,
    "an expert that gets no token": lambda x: x - torch.tensor([0, 0, 0, 99.0, 0, 0, 0, 0]),
    "an expert that gets all tokens": lambda x: x + torch.tensor([0, 0, 99.0, 0, 0, 0, 0, 0]),
    "the experts of one rank get all tokens": lambda x: x - torch.tensor([99.0] * 6 + [0, 0]),
    "equal scores": lambda x: x * 0,
}


def draw(length):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [normal(EXPERTS, 2 * HIDDEN, DIM), normal(EXPERTS, DIM, HIDDEN)]
    return normal(2, length, DIM), normal(2, length, EXPERTS), normal(2, length, DIM), *weights


@cache
def one_by_one(bounds, rule, kind):
    """Output and gradients of x, logits and weights on one rank, where each expert computes all tokens."""
    x, logits, do, gate_up, down = draw(bounds[-1])
    leaves = [t.requires_grad_() for t in (x, logits, gate_up, down)]
    logits = LOGITS[kind](logits)
    routing = choose_experts(logits, scores(logits, rule.score), rule, Layout(bounds))
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):  # of all tokens, and of its own the weight, 0 of others
        weight = (routing.weights * (routing.experts == expert)).sum(dim=-1, keepdim=True)
        out = out + weight * (reference.swiglu(x @ gate_up[expert].T) @ down[expert].T)
    out.backward(do)
    return out.detach(), *(leaf.grad for leaf in leaves)


def on_rank(cases, rule, tile=None):
    """The same of this rank's tokens, and of the experts that it has."""
    size, rank = dist.get_world_size(), dist.get_rank()
    axis = Axis.from_group(dist.group.WORLD)
    mine = slice(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
    answers = []
    for bounds, order, kind in cases:
        layout = layout_here(bounds, order)
        x, logits, do, gate_up, down = draw(bounds[-1])
        x, logits, do = (layout.shard(t).clone() for t in (x, logits, do))
        leaves = [t.requires_grad_() for t in (x, logits, gate_up[mine].clone(), down[mine].clone())]
        x, logits, gate_up, down = leaves
        logits = LOGITS[kind](logits)
        routing = choose_experts(logits, scores(logits, rule.score), rule, layout)

        def compute(rows, ends, gate_up=gate_up, down=down):
            return grouped_swiglu(rows, ends, gate_up, down, tile)

        out = mixture_of_experts(x, routing, EXPERTS, compute, axis)
        out.backward(do)
        answers.append((out.detach(), *(leaf.grad for leaf in leaves)))
    return answers


RULES = {"all": TokenChoice(3), "capacity": TokenChoice(2, score="sigmoid", capacity=0.7)}


@pytest.mark.parametrize(
    ("size", "rule"),
    mostly_slow_rows(
        itertools.product([1, 2, 4], RULES), lambda size, rule: (size, rule) in [(1, "all"), (2, "capacity"), (4, rule)]
    ),
)
@pairs_or_everything
def test_experts_over_ranks_equal_each_token_by_itself(ranks, size, rule, combinations):
    if combinations is pairs and (size, rule) != (4, "capacity"):
        combinations = few
    rule = RULES[rule]
    cases = combinations(BOUNDS, ORDERS, list(LOGITS))
    answers = ranks.run(on_rank, cases, rule, size=size)
    for number, (bounds, order, kind) in enumerate(cases):
        layout = Layout(bounds, order, size)
        out, dx, dlogits, dgate_up, ddown = zip(*(answer[number] for answer in answers), strict=True)
        got = layout.unshard(out), layout.unshard(dx), layout.unshard(dlogits), torch.cat(dgate_up), torch.cat(ddown)
        for name, have, want in zip(
            ("out", "x", "logits", "gate_up", "down"), got, one_by_one(bounds, rule, kind), strict=True
        ):
            assert (have - want).norm() <= 1e-10 * max(want.norm(), 1), f"{name}: {bounds} {order} {kind}"


def bytes_sent():
    layout = layout_here((0, 48), "contiguous")
    x, logits, do, gate_up, down = (t.float() for t in draw(48))
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = slice(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
    x, do = layout.shard(x).requires_grad_(), layout.shard(do)
    logits = layout.shard(logits)
    routing = choose_experts(logits, scores(logits, "softmax"), TokenChoice(2), layout)
    with counting() as counted:
        out = mixture_of_experts(
            x,
            routing,
            EXPERTS,
            lambda r, e: grouped_swiglu(r, e, gate_up[mine], down[mine]),
            Axis.from_group(dist.group.WORLD),
        )
        out.backward(do)
    # Rows that come here, and answers that come back, both ways; and a number for each expert that this rank has.
    own = (routing.experts // (EXPERTS // size) == rank).sum()
    return (
        (counted.calls["all_to_all"], counted.bytes["all_to_all"]),
        routing.experts.numel() - int(own),
        routing.experts // (EXPERTS // size),
    )


def test_only_rows_that_were_routed_elsewhere_travel(ranks):
    answers = ranks.run(bytes_sent, size=4)
    owners = torch.stack([a[2] for a in answers])
    for rank, (counted, away, _) in enumerate(answers):
        others = torch.cat([owners[:rank], owners[rank + 1 :]])
        arriving = int((others == rank).sum())
        want = 2 * 4 * DIM * (arriving + away) + 3 * (EXPERTS // 4) * 8
        assert counted == (5, want)


def test_a_tile_of_rows_changes_nothing(ranks):
    cases = [((0, 48), "contiguous", "of chance")]
    for whole, tiled in zip(
        ranks.run(on_rank, cases, TokenChoice(2), size=2),
        ranks.run(on_rank, cases, TokenChoice(2), 5, size=2),
        strict=True,
    ):
        for a, b in zip(whole[0], tiled[0], strict=True):
            torch.testing.assert_close(a, b)


def test_experts_that_do_not_divide_over_ranks_are_refused():
    x, logits, *_ = draw(8)
    routing = choose_experts(logits, scores(logits, "softmax"), TokenChoice(2), Layout((0, 8)))
    with pytest.raises(ValueError, match="8 experts do not divide over 3 ranks"):
        mixture_of_experts(x, routing, EXPERTS, lambda rows, ends: rows, Axis(3, 0, None))

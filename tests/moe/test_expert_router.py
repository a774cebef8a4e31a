"""The choice of experts, against the equations written out a token at a time, and what it does at the edges."""

import math

import pytest
import torch
from torch.nn import functional as F

from longctx.moe.expert_router import TokenChoice, balancing_step, choose_experts, scores
from longctx.moe.report import set_keys
from longctx.parallel.layout import Layout
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, layout_here

LAYOUT = Layout((0, 3, 11))


def draw(length=11, experts=8, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, length, experts, generator=generator, dtype=torch.float64)


def route(logits, rule, layout=LAYOUT, bias=None):
    return choose_experts(logits, scores(logits, rule.score), rule, layout, bias=bias)


def written_out(logits, rule, bias=None):
    """Experts, weights and the two losses, a token at a time; sequences of one rank."""
    tokens, count = logits.flatten(0, 1), logits.shape[-1]
    chosen, weights, load, importance, z = [], [], torch.zeros(count).double(), torch.zeros(count).double(), 0.0
    for row in tokens:
        p = F.softmax(row, dim=0) if rule.score == "softmax" else torch.sigmoid(row)
        judged = p + (0 if bias is None else bias)
        groups = judged.view(rule.groups, -1)
        best = [
            group.sort(descending=True).values[: max(1, rule.active // rule.active_groups)].sum() for group in groups
        ]
        allowed = sorted(range(rule.groups), key=lambda g: -best[g])[: rule.active_groups]
        size = count // rule.groups
        open_ = [e for e in range(count) if e // size in allowed]
        experts = sorted(open_, key=lambda e: -judged[e])[: rule.active]
        weight = p[experts]
        if rule.normalize:
            weight = weight / weight.sum()
        chosen.append(experts)
        weights.append(weight * rule.scale)
        for e in experts:
            load[e] += 1
        importance = importance + p / p.sum()
        z = z + torch.logsumexp(row, dim=0) ** 2
    n = len(tokens)
    balance = count * sum(f * m for f, m in zip(load / (n * rule.active), importance / n, strict=True))
    shape = logits.shape[:2]
    return torch.tensor(chosen).view(*shape, -1), torch.stack(weights).view(*shape, -1), balance, z / n, load


RULES = {
    "switch": TokenChoice(1, normalize=False),
    "softmax": TokenChoice(3, balance=0.7, z=0.2),
    "all": TokenChoice(8),
    "sigmoid": TokenChoice(3, score="sigmoid", scale=2.5, balance=0.7, z=0.2),
    "groups": TokenChoice(4, score="sigmoid", groups=4, active_groups=2, balance=0.3),
    "one group": TokenChoice(2, groups=2, active_groups=1, normalize=False),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_it_is_the_published_choice(rule, biased):
    logits = draw().requires_grad_()
    bias = torch.linspace(0.3, -0.3, 8, dtype=torch.float64) if biased else None
    experts, weights, balance, z, load = written_out(logits, rule, bias)
    routing = route(logits, rule, bias=bias)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, weights)
    loss = rule.balance * balance + rule.z * z
    torch.testing.assert_close(routing.report.loss, torch.as_tensor(loss, dtype=torch.float64))
    assert torch.equal(routing.report.counts, load.long())
    towards = torch.randn(weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad((weights * towards).sum() + loss, logits, retain_graph=True)
    (got,) = torch.autograd.grad((routing.weights * towards).sum() + routing.report.loss, logits)
    torch.testing.assert_close(got, want)


def test_the_bias_moves_the_choice_and_not_the_weights():
    logits = draw()
    bias = torch.zeros(8, dtype=torch.float64)
    bias[5] = 10
    routing = route(logits, TokenChoice(2, normalize=False), bias=bias)
    assert (routing.experts[..., 0] == 5).all()
    torch.testing.assert_close(routing.weights[..., 0], logits.softmax(-1)[..., 5])


def test_a_step_of_the_bias_lifts_who_got_less_than_the_mean():
    moved = balancing_step(torch.zeros(4), torch.tensor([0, 4, 8, 4]), 0.001)
    torch.testing.assert_close(moved, torch.tensor([0.001, 0.0, -0.001, 0.0]))


def test_of_equal_scores_the_first_experts_are_taken():
    routing = route(torch.zeros(2, 11, 8), TokenChoice(3, balance=1.0))
    assert torch.equal(routing.experts, torch.tensor([0, 1, 2]).expand(2, 11, 3))
    torch.testing.assert_close(routing.weights, torch.full((2, 11, 3), 1 / 3))
    torch.testing.assert_close(routing.report.entropy, torch.tensor(22 * math.log(8)))
    torch.testing.assert_close(routing.report.loss, torch.tensor(1.0))


def test_half_precision_is_routed_in_float32():
    routing = route(draw().bfloat16(), TokenChoice(2, balance=1.0))
    assert routing.weights.dtype == routing.report.loss.dtype == torch.float32


def test_logits_that_are_no_numbers_are_reported_and_still_route_somewhere():
    logits = draw()
    assert route(logits, TokenChoice(2)).report.finite
    logits[1, 4, 2] = math.nan
    routing = route(logits, TokenChoice(2))
    assert not routing.report.finite
    assert ((routing.experts >= 0) & (routing.experts < 8)).all()


def test_a_set_of_experts_has_one_mark_whatever_its_order():
    logits = torch.tensor([[[3.0, 2, 0, 0], [2.0, 3, 0, 0], [0.0, 3, 2, 0]]])
    first, second, third = route(logits, TokenChoice(2), Layout((0, 3))).report.choice[0]
    assert first == second != third


def test_marks_are_the_same_after_any_number_of_routings():
    """They are made once and kept: a router that changed them would hide a later one's choices."""
    set_keys.cache_clear()
    before = set_keys(1, torch.device("cpu")).clone()
    assert before != 0
    route(draw(), TokenChoice(2))
    assert torch.equal(set_keys(1, torch.device("cpu")), before)
    alone = route(draw(experts=1), TokenChoice(1))
    assert torch.equal(alone.report.choice, before.expand(2, 11))


def queue(experts, most):
    """What a capacity keeps, a sequence at a time and a choice at a time."""
    kept = experts.clone()
    for row in kept:
        taken = {}
        for token in row:
            for column, expert in enumerate(token.tolist()):
                taken[expert] = taken.get(expert, 0) + 1
                if taken[expert] > most:
                    token[column] = -1
    return kept


def with_capacity(layout, logits, rule):
    routing = route(layout.shard(logits), rule, layout)
    return routing.experts, routing.report.dropped, routing.report.counts, routing.report.loss, routing.report.tokens


def on_rank(cases, rule):
    return [with_capacity(layout_here(bounds, order), draw(bounds[-1]), rule) for bounds, order in cases]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_capacity_keeps_the_first_choices_of_the_sequence_wherever_they_lie(ranks, size):
    rule = TokenChoice(2, capacity=0.8, balance=1.0, z=1.0)
    cases = [(bounds, order) for bounds in (*PACKINGS.values(), *UNEVEN.values()) for order in ORDERS]
    answers = ranks.run(on_rank, cases, rule, size=size)
    for number, (bounds, order) in enumerate(cases):
        layout, length = Layout(bounds, order, size), bounds[-1]
        parts, dropped, counts, losses, tokens = zip(*(answer[number] for answer in answers), strict=True)
        whole = route(draw(length), TokenChoice(2, balance=1.0, z=1.0), Layout(bounds))
        want = queue(whole.experts, math.ceil(0.8 * length * 2 / 8))
        assert torch.equal(layout.unshard(parts), want), f"{bounds} {order}"
        assert sum(dropped) == (want < 0).sum()
        assert torch.equal(sum(counts), whole.report.counts)
        assert sum(tokens) == 2 * length
        torch.testing.assert_close(sum(losses), whole.report.loss)


@pytest.mark.parametrize(
    ("shape", "rule", "words"),
    [
        ((2, 10, 6), TokenChoice(2), "the layout has 11 tokens on this rank"),
        ((2, 11, 6), TokenChoice(7), "7 active of 6 experts"),
        ((2, 11, 6), TokenChoice(0), "0 active of 6 experts"),
        ((2, 11, 6), TokenChoice(1, groups=4), "number of groups that divides the experts"),
        ((2, 11, 6), TokenChoice(3, groups=3, active_groups=1), "1 active groups of 2 experts have fewer than the 3"),
    ],
)
def test_what_does_not_fit_is_named(shape, rule, words):
    with pytest.raises(ValueError, match=words):
        route(torch.zeros(shape), rule)

"""The state scan over ranks against the recurrence on one."""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.layout import STATE_SCHEDULES, Layout
from longctx.parallel.linear.state_scan import begin_state_scan, state_scan
from longctx.parallel.traffic import count_traffic
from tests.combinations import few, mostly_slow, mostly_slow_rows, pairs, pairs_or_everything
from tests.kernels.linear.cases import KINDS, by_reference, draw
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, few_examples, layout_here, many_examples, packings

each_kind = pytest.mark.parametrize("kind", KINDS)
RICHEST = ("constant", "vector", "delta, scalar", "delta, vector")
"""Those whose gates and transitions are of every form; of the others tests/mixers/test_parity.py has a mixer each."""
HEADS = (4, 2, 4, 2)


def sharded(case, layout, dtype):
    """A case's tokens for this rank, and its gates, as leaves."""
    case = case.to(dtype)
    tokens = [layout.shard(x).requires_grad_() for x in (case.q, case.k, case.v)]
    gates = tuple((g if g.dim() == 1 else layout.shard(g)).clone().requires_grad_() for g in case.gates)
    return case, tokens, gates


def on_rank(kind, cases, dtype, states="all-gather", begun=False):
    answers = []
    for bounds, order, continued in cases:
        layout = layout_here(bounds, order, 4 if continued else 0, states)
        case, tokens, gates = sharded(draw(kind, bounds[-1], heads=HEADS), layout, dtype)
        state = case.state.clone().requires_grad_()
        with count_traffic() as traffic:
            asked = {"initial_state": state if continued else None, "final_state": True}
            if begun:
                q, k, v = tokens
                out, final = begin_state_scan(case.recurrence, k, v, gates, layout, **asked).finish(q)
            else:
                out, final = state_scan(case.recurrence, *tokens, gates, layout, **asked)
            torch.autograd.backward([out, final], [layout.shard(case.do), case.dend])
        grads = [x.grad for x in (*tokens, *gates, state)]
        answers.append((out.detach(), final.detach(), grads, dict(traffic.calls)))
    return answers


@pytest.mark.parametrize(
    ("size", "dtype", "bound", "kind"),
    mostly_slow_rows(
        [
            (*row, kind)
            for row in ((1, torch.float64, 1e-10), (2, torch.float32, 1e-5), (4, torch.float64, 1e-10))
            for kind in KINDS
        ],
        lambda size, dtype, bound, kind: kind in {1: [], 2: ["delta, vector"], 4: RICHEST}[size],
    ),
)
@pairs_or_everything
def test_every_layout_equals_the_reference_on_one_rank(ranks, kind, size, dtype, bound, combinations):
    bounds = [*PACKINGS.values(), *UNEVEN.values()]
    if combinations is pairs and (size, kind) != (4, "delta, vector"):  # it has the gates and transitions of all others
        combinations = few
    cases = combinations(bounds, ORDERS, [False, True])
    answers = ranks.run(on_rank, kind, cases, dtype, size=size)
    compare(answers, kind, cases, size, dtype, bound)
    assert all(answer[-1] == ({"all_gather": 2} if size > 1 else {}) for each in answers for answer in each)


@cache
def expected(kind, bounds, continued):
    """Everything of the whole sequence, by the reference."""
    case = draw(kind, bounds[-1], heads=HEADS)
    if not continued:
        case.state.zero_()
    return by_reference(case, bounds[1:-1] if continued else bounds[:-1])


def compare(answers, kind, cases, size, dtype, bound):
    for number, (bounds, order, continued) in enumerate(cases):
        layout, want = Layout(bounds, order, size), expected(kind, bounds, continued)
        outs, finals, grads, _ = zip(*(answer[number] for answer in answers), strict=True)
        got = {"o": layout.unshard(outs)}
        names = [name for name in want if name.startswith("d")]
        for name, parts in zip(names, zip(*grads, strict=True), strict=True):
            if name == "dstate":
                continue
            constant = parts[0].dim() == 1
            got[name] = sum(part.double() for part in parts) if constant else layout.unshard(parts)
        compared = [(name, x, want[name]) for name, x in got.items()]
        compared += [("final state", final, want["end"]) for final in finals]
        if continued:
            compared += [("initial state", each[-1], want["dstate"]) for each in grads]
        for name, x, ref in compared:
            floor = bound * 1e-6 if dtype == torch.float32 else 1e-200
            assert (x - ref).norm() <= bound * ref.norm() + floor, f"{name} {bounds} {order} continued={continued}"


@pytest.mark.parametrize(
    ("states", "kind"),
    mostly_slow_rows(
        itertools.product(["ring", "tree"], KINDS),
        lambda states, kind: kind in ("delta, vector", "vector" if states == "tree" else "scalar"),
    ),
)
@pytest.mark.parametrize("size", mostly_slow([1, 2, 4], 4))
@pairs_or_everything
def test_other_schedules_of_states_give_the_same(ranks, kind, states, size, combinations):
    bounds = [PACKINGS["ends inside slices"], PACKINGS["over all ranks but the ends"], UNEVEN["a ragged end"]]
    if combinations is pairs and kind != "delta, vector":
        combinations = few
    cases = combinations(bounds, ORDERS, [False, True])
    answers = ranks.run(on_rank, kind, cases, torch.float64, states, size=size)
    compare(answers, kind, cases, size, torch.float64, 1e-10)
    assert all(set(answer[-1]) == ({"exchange"} if size > 1 else set()) for each in answers for answer in each)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "scalar", "delta, vector"))
def test_a_scan_that_was_begun_early_gives_the_same(ranks, kind):
    cases = list(itertools.product([PACKINGS["ends inside slices"]], ORDERS, [False, True]))
    answers = ranks.run(on_rank, kind, cases, torch.float64, "all-gather", True, size=4)
    compare(answers, kind, cases, 4, torch.float64, 1e-10)
    assert all(answer[-1] == {"all_gather": 2} for each in answers for answer in each)


case_lists = st.lists(st.tuples(packings(), st.sampled_from(ORDERS), st.booleans()), min_size=4, max_size=4)
any_scan = given(cases=case_lists, kind=st.sampled_from(list(KINDS)), states=st.sampled_from(STATE_SCHEDULES))


@few_examples
@any_scan
def test_documents_that_begin_and_end_anywhere_equal_one_rank(ranks, cases, kind, states):
    compare(ranks.run(on_rank, kind, cases, torch.float64, states, size=4), kind, cases, 4, torch.float64, 1e-10)


@pytest.mark.slow
@many_examples
@any_scan
def test_eight_ranks_equal_one_rank(eight_ranks, cases, kind, states):
    compare(eight_ranks.run(on_rank, kind, cases, torch.float64, states), kind, cases, 8, torch.float64, 1e-10)


def what_travels(kind, states, order):
    layout = layout_here((0, 64), order, 0, states)
    case, tokens, gates = sharded(draw(kind, 64), layout, torch.float64)
    with count_traffic() as traffic:
        out, _ = state_scan(case.recurrence, *tokens, gates, layout)
        out.backward(layout.shard(case.do))
    return traffic.bytes["exchange"]


STATE = 6 * 35 * 8
"""Bytes of the states of B 2 x H 3, K 5 x V 7 in float64."""


@pytest.mark.parametrize(("kind", "transition"), [("constant", 1), ("delta", 25)])
def test_the_ring_sends_states_and_the_tree_maps(ranks, kind, transition):
    # Forward from rank to rank, and backward back: the ranks at the ends get a state in one direction alone.
    assert ranks.run(what_travels, kind, "ring", "contiguous", size=4) == [STATE, 2 * STATE, 2 * STATE, STATE]
    # In zigzag order there and back again in each direction; the last rank's pieces are neighbours.
    assert ranks.run(what_travels, kind, "ring", "zigzag", size=4) == [2 * STATE, 4 * STATE, 4 * STATE, 2 * STATE]
    # Pieces get a map of the piece before them, then those of 1, 2 pieces before that, as far as there are any.
    maps, each = [0, 1, 2, 3], 6 * (35 + transition) * 8
    want = [(maps[rank] + maps[3 - rank]) * each for rank in range(4)]
    assert ranks.run(what_travels, kind, "tree", "contiguous", size=4) == want


def received_bytes(kind, length):
    layout = layout_here((0, length), "zigzag")
    case, tokens, gates = sharded(draw(kind, length), layout, torch.float64)
    with count_traffic() as traffic:
        out, _ = state_scan(case.recurrence, *tokens, gates, layout)
        out.backward(layout.shard(case.do))
    return traffic.bytes["all_gather"]


@pytest.mark.parametrize(("kind", "transition"), [("constant", 1), ("scalar", 1), ("vector", 5), ("delta", 25)])
def test_bytes_follow_the_formula_and_do_not_grow_with_the_sequence(ranks, kind, transition):
    # 2 passes x 3 other ranks x 2 slices x (B 2 x H 3) x (the transition + K 5 x V 7) float64
    want = 2 * 3 * 2 * 6 * (transition + 35) * 8
    assert ranks.run(received_bytes, kind, 16, size=4) == [want] * 4
    assert ranks.run(received_bytes, kind, 1024, size=4) == [want] * 4


def outputs_around(kind, order, times):
    layout = layout_here((0, 17, 48), order)
    outs = []
    for t in (None, *times):
        case = draw(kind, 48)
        for x in (case.q, case.k, case.v) if t is not None else ():
            x[:, t] = 100.0
        case, tokens, gates = sharded(case, layout, torch.float32)
        outs.append(state_scan(case.recurrence, *tokens, gates, layout)[0].detach())
    return outs


@each_kind
@pytest.mark.parametrize("order", mostly_slow(["contiguous", "zigzag"], "zigzag"))
def test_changing_a_token_leaves_earlier_outputs_on_all_ranks_bitwise_unchanged(ranks, kind, order):
    times = (0, 16, 30, 47)
    layout = Layout((0, 17, 48), order, 4)
    answers = ranks.run(outputs_around, kind, order, times, size=4)
    before, *after = (layout.unshard(parts) for parts in zip(*answers, strict=True))
    for t, changed in zip(times, after, strict=True):
        assert torch.equal(before[:, :t], changed[:, :t])
        assert not torch.equal(before[:, t], changed[:, t])


def test_wrong_arguments_are_refused():
    case = draw("constant", 8)
    arguments = (case.recurrence, case.q, case.k, case.v, case.gates)
    with pytest.raises(ValueError, match="q has 8 tokens: expected 4, this rank's share of the layout"):
        state_scan(*arguments, Layout((0, 4)))
    with pytest.raises(ValueError, match="has past_tokens = 0"):
        state_scan(*arguments, Layout((0, 8)), initial_state=case.state)
    with pytest.raises(ValueError, match=r"initial_state has shape \[1, 3, 5, 7\]: expected .* = \[2, 3, 5, 7\]"):
        state_scan(*arguments, Layout((0, 8), past_tokens=1), initial_state=case.state[:1])

"""State exchange: start states by every schedule against one scan over all pieces, and bytes."""

import itertools

import pytest
import torch

from longctx.kernels.linear.recurrence import Carry, exclusive_scan
from longctx.parallel.layout import STATE_SCHEDULES, Layout
from longctx.parallel.linear.state_exchange import RankExchange
from longctx.parallel.traffic import count_traffic
from tests.parallel.cases import layout_here

BATCH, HEADS, K, V = 2, 3, 4, 5
TRANSITIONS = {"scalar": (), "diagonal": (K,), "matrix": (K, K)}
"""Dimensions of the transition per head."""
STATE_BYTES = BATCH * HEADS * K * V * 8
BOUNDS = (0, 48)


def carry_bytes(kind):
    return BATCH * HEADS * torch.Size(TRANSITIONS[kind]).numel() * 8 + STATE_BYTES


def draw(kind, pieces):
    """The carry of each piece, in sequence order, and the start state; in one piece a document begins."""
    generator = torch.Generator().manual_seed(pieces)

    def normal(*shape):
        return torch.randn(BATCH, HEADS, *shape, generator=generator, dtype=torch.float64)

    carries = []
    for number in range(pieces):
        transition = normal(*TRANSITIONS[kind])
        if kind != "matrix":
            transition = -transition.abs()
        if number == 1:
            transition = (
                torch.full_like(transition, float("-inf")) if kind != "matrix" else torch.zeros_like(transition)
            )
        carries.append(Carry(transition, normal(K, V)))
    return carries, normal(K, V)


def exchange(cases):
    answers = []
    for schedule, order, kind, reverse, final_needed in cases:
        layout = layout_here(BOUNDS, order)
        carries, state = draw(kind, layout.pieces)
        own = [carries[n] for n in layout.pieces_of(layout.rank)]
        run = RankExchange(layout, layout.comm_group, schedule, "blocks.3", final_needed)
        with count_traffic() as traffic:
            wait = run(own, state, reverse)
            begun = dict(traffic.calls)
            states, final = wait()
        assert set(traffic.layers) == {"blocks.3"}
        answers.append((torch.stack(states), final, begun, traffic.received))
    return answers


@pytest.mark.parametrize("size", [3, 4])
def test_every_schedule_gives_the_start_states_of_one_scan(ranks, size):
    orders = [("zigzag", kind) for kind in TRANSITIONS] + [("contiguous", "matrix"), ("balanced", "scalar")]
    cases = [
        (schedule, order, kind, reverse, (True, True))
        for schedule, (order, kind), reverse in itertools.product(STATE_SCHEDULES, orders, [False, True])
    ]
    for case, *parts in zip(cases, *ranks.run(exchange, cases, size=size), strict=True):
        _, order, kind, reverse, _ = case
        layout = Layout(BOUNDS, order, size)
        carries, state = draw(kind, layout.pieces)
        *want, end = exclusive_scan(carries[::-1] if reverse else carries, state)
        want = want[::-1] if reverse else want
        for rank, (states, final, *_) in enumerate(parts):
            here = torch.stack([want[n] for n in layout.pieces_of(rank)])
            torch.testing.assert_close(states, here, rtol=1e-12, atol=1e-12, msg=str(case))
            torch.testing.assert_close(final, end, rtol=1e-12, atol=1e-12, msg=str(case))


@pytest.mark.parametrize("schedule", ["ring", "tree"])
def test_the_final_state_travels_only_where_it_is_needed(ranks, schedule):
    needs = [(False, False), (True, False), (False, True)]
    cases = [(schedule, "zigzag", "scalar", reverse, need) for reverse in (False, True) for need in needs]
    answers = ranks.run(exchange, cases, size=3)
    for rank, by_case in enumerate(answers):
        without = by_case[0][3]
        for (_, _, _, reverse, need), (_, final, _, received) in zip(cases, by_case, strict=True):
            assert bool(final.isfinite().all()) == need[reverse]
            # The first and the last piece of a zigzag sequence are rank 0's, forward and reverse.
            assert received - without == (STATE_BYTES if need[reverse] and rank else 0)


def test_the_all_gather_starts_at_once_and_receives_the_carries_of_the_other_ranks(ranks):
    cases = [
        ("all-gather", "zigzag", kind, reverse, (False, False)) for kind in TRANSITIONS for reverse in (False, True)
    ]
    for answers in ranks.run(exchange, cases, size=4):
        for (_, _, kind, _, _), (_, final, begun, received) in zip(cases, answers, strict=True):
            assert begun == {"all_gather": 1}
            assert received == 3 * 2 * carry_bytes(kind)
            assert final.isfinite().all()


def test_the_ring_receives_states_and_the_tree_receives_carries(ranks):
    kinds = list(TRANSITIONS)
    cases = [(s, "contiguous", kind, False, (False, False)) for s in ("ring", "tree") for kind in kinds]
    for rank, answers in enumerate(ranks.run(exchange, cases, size=4)):
        received = [answer[3] for answer in answers]
        assert received[:3] == [STATE_BYTES if rank else 0] * 3
        # From the piece before, and from 1 and 2 pieces before that, where there are any.
        assert received[3:] == [min(rank, 3) * carry_bytes(kind) for kind in kinds]

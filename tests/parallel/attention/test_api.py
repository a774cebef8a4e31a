"""Softmax attention over ranks, by every schedule, against the dense reference."""

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longctx.kernels.attention import reference
from longctx.kernels.attention.block import CAUSAL_MASK, IntervalMask
from longctx.kernels.linear.recurrence import document_ids
from longctx.parallel.attention.api import BETWEEN_OWNERS, softmax_attention
from longctx.parallel.attention.visibility import KVOwners, score_elements
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from longctx.parallel.traffic import count_traffic
from tests.combinations import mostly_slow, mostly_slow_rows, pairs_or_everything
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, few_examples, many_examples, packings

MASKS = [CAUSAL_MASK, IntervalMask(window=5), IntervalMask(causal=False), IntervalMask(causal=False, window=3)]
HEADS = (8, 2)
"""Query heads, and fewer key/value heads than there are ranks."""


def draw(length, dtype=torch.float64, heads=HEADS):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, heads[0], 6), (2, length, heads[1], 6), (2, length, heads[1], 4), (2, length, heads[0], 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense_mask(bounds, mask):
    causal, window = mask.causal, mask.window
    places, ids = torch.arange(bounds[-1]), document_ids(bounds[-1], bounds[:-1], torch.device("cpu"))
    distance = places[:, None] - places[None, :]
    seen = ids[:, None] == ids[None, :]
    if causal:
        seen &= distance >= 0
    return seen if window is None else seen & (distance.abs() < window)


def attend(q, k, v, do, layout, schedule, mask):
    """Output, gradients and traffic on this rank."""
    leaves = [layout.shard(x).requires_grad_() for x in (q, k, v)]
    for leaf in leaves:
        for gap in layout.padding:
            leaf.data[:, gap] = float("nan")
    with count_traffic() as traffic:
        out = softmax_attention(*leaves, layout, 0.3, schedule=schedule, mask=mask)
        out.backward(layout.shard(do))
    return out.detach(), *(x.grad for x in leaves), dict(traffic.calls), dict(traffic.bytes)


def on_rank(cases, dtype, ulysses, heads):
    mesh = Mesh.build("cpu", cp=dist.get_world_size(), ulysses=ulysses)
    return [
        attend(*draw(bounds[-1], dtype, heads), Layout.on(mesh, bounds, order), schedule, mask)
        for bounds, order, schedule, mask in cases
    ]


@cache
def dense(bounds, mask, dtype, heads):
    """The output and the gradients of q, k and v, of the whole sequence."""
    *leaves, do = (x.double() for x in draw(bounds[-1], dtype, heads))
    for leaf in leaves:
        leaf.requires_grad_()
    out, _ = reference.softmax_attention(*leaves, dense_mask(bounds, mask), 0.3)
    out.backward(do)
    return out.detach(), *(x.grad for x in leaves)


def compare(answers, cases, size, dtype, bound, heads=HEADS):
    for number, (bounds, order, schedule, mask) in enumerate(cases):
        layout = Layout(bounds, order, size)
        parts = list(zip(*(answer[number] for answer in answers), strict=True))
        refs = dense(bounds, mask, dtype, heads)
        for name, part, ref in zip(("o", "dq", "dk", "dv"), parts, refs, strict=False):
            case = f"{name} {bounds} {order} {schedule} {mask}"
            assert torch.isfinite(torch.stack(part)).all(), case
            assert (layout.unshard(part) - ref).norm() <= bound * max(ref.norm(), 1), case
            for rank, each in enumerate(part):
                for gap in layout.for_rank(rank).padding:
                    assert (each[:, gap] == 0).all(), case


def grid(size):
    """The Ulysses groups that the schedules of both kinds are tried with."""
    return 2 if size % 2 == 0 else 1


def schedules(size):
    if size == 1:
        return ["all-gather", "ring"]
    return [s for s in BETWEEN_OWNERS if grid(size) > 1 or not s.startswith("ulysses-")]


@pytest.mark.parametrize(
    ("size", "mask"),
    mostly_slow_rows(
        itertools.product([1, 2, 4], MASKS), lambda size, mask: mask in {1: MASKS[:3], 2: [], 4: MASKS[:1]}[size]
    ),
    ids=lambda x: f"{x.causal}-{x.window}" if isinstance(x, IntervalMask) else str(x),
)
@pairs_or_everything
def test_every_schedule_and_layout_equals_one_rank(ranks, size, mask, combinations):
    cases = combinations([*PACKINGS.values(), *UNEVEN.values()], ORDERS, schedules(size), [mask])
    answers = ranks.run(on_rank, cases, torch.float64, grid(size), HEADS, size=size)
    compare(answers, cases, size, torch.float64, 1e-10)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_schedule_equals_one_rank_in_other_dtypes(ranks, dtype, bound):
    cases = list(itertools.product([PACKINGS["ends inside slices"]], ["zigzag"], schedules(4), MASKS[:2]))
    answers = ranks.run(on_rank, cases, dtype, 2, HEADS, size=4)
    compare(answers, cases, 4, dtype, bound)


@pytest.mark.parametrize("heads", mostly_slow([(4, 4), (4, 1), (12, 3), (12, 2), (24, 6)], (4, 1), (12, 2), (24, 6)))
def test_key_value_heads_group_in_any_way(ranks, heads):
    cases = list(itertools.product([PACKINGS["ends inside slices"]], ["zigzag"], schedules(4), MASKS[:1]))
    answers = ranks.run(on_rank, cases, torch.float64, 2, heads, size=4)
    compare(answers, cases, 4, torch.float64, 1e-10, heads)


TIMES = (0, 16, 30, 46)


def outputs_around(order, schedule):
    """Outputs of this rank, and those where the token at each of TIMES is another one."""
    layout = Layout.on(Mesh.build("cpu", cp=4, ulysses=2), (0, 17, 47), order)
    outs = []
    for t in (None, *TIMES):
        q, k, v, _ = draw(47, torch.float32)
        for x in (q, k, v) if t is not None else ():
            x[:, t] = torch.randn_like(x[:, t])
        outs.append(softmax_attention(*map(layout.shard, (q, k, v)), layout, 0.3, schedule=schedule))
    return outs


@pytest.mark.parametrize(
    ("schedule", "order"),
    mostly_slow_rows(
        itertools.product(BETWEEN_OWNERS, ORDERS), lambda schedule, order: order == "zigzag" or schedule == "ring"
    ),
)
def test_changing_a_token_leaves_earlier_outputs_on_all_ranks_bitwise_unchanged(ranks, order, schedule):
    layout = Layout((0, 17, 47), order, 4)
    answers = ranks.run(outputs_around, order, schedule, size=4)
    before, *others = (layout.unshard(parts) for parts in zip(*answers, strict=True))
    for t, after in zip(TIMES, others, strict=True):
        assert torch.equal(before[:, :t], after[:, :t]), t
        assert not torch.equal(before[:, t], after[:, t]), t


def formula(schedule, rows):
    """Calls and received bytes of a rank of 4, forward and backward, with 2 sequences, K = 6 and V = 4 in float64."""
    others, number = 3 * 2 * rows, 8
    if schedule == "all-gather":
        # Both key/value heads by themselves, gathered twice; their gradients are summed on the way back.
        keys = others * HEADS[1] * (6 + 4) * number
        return {"all_gather": 4, "reduce_scatter": 2}, {"all_gather": 2 * keys, "reduce_scatter": keys}
    # A rank has 2 of 8 query heads, and the one key/value head that they read.
    there, home = others * (2 * 6 + 6 + 4) * number, others * 2 * 4 * number
    # Backward the other way: gradients of 2 query heads and of as many key/value heads as each rank was sent.
    return {"all_to_all": 4}, {"all_to_all": 2 * (there + home)}


@pytest.mark.parametrize("schedule", ["all-gather", "ulysses"])
def test_calls_and_bytes_follow_the_formula(ranks, schedule):
    answers = ranks.run(on_rank, [((0, 5, 47), "zigzag", schedule, MASKS[0])], torch.float64, 1, HEADS, size=4)
    assert [each[0][4:] for each in answers] == [formula(schedule, rows=12)] * 4


@pytest.mark.parametrize(
    ("bounds", "order", "mask", "keys", "calls"),
    [
        # Keys that each rank gets from others: in contiguous order those before its own.
        ((0, 48), "contiguous", MASKS[0], [0, 12, 24, 36], None),
        # In zigzag order the early piece of every rank before it, and both of every rank behind it.
        ((0, 48), "zigzag", MASKS[0], [36, 30, 24, 18], None),
        # A window reaches 4 tokens back: of the rank before it alone, and in zigzag order of the pieces before its two.
        ((0, 48), "contiguous", MASKS[1], [0, 4, 4, 4], None),
        ((0, 48), "zigzag", MASKS[1], [4, 8, 8, 4], None),
        # Documents end where ranks meet: nothing travels.
        ((0, 12, 24, 36, 48), "contiguous", MASKS[0], [0, 0, 0, 0], [{}] * 4),
        ((0, 12, 24, 36, 48), "contiguous", MASKS[2], [0, 0, 0, 0], [{}] * 4),
        # Documents that reach over from one rank to the next, and no further.
        ((0, 14, 30, 48), "contiguous", MASKS[0], [0, 12, 10, 6], None),
        ((0, 48), "contiguous", MASKS[3], [2, 4, 4, 2], None),
    ],
)
def test_the_ring_sends_what_is_seen_and_nothing_else(ranks, bounds, order, mask, keys, calls):
    answers = ranks.run(on_rank, [(bounds, order, "ring", mask)], torch.float64, 1, HEADS, size=4)
    each = HEADS[1] * (6 + 4) * 2 * 8
    layouts = [Layout(bounds, order, 4, rank) for rank in range(4)]
    sent = [0] * 4
    for reader in range(4):
        owners = KVOwners(layouts[0], [layout.pieces_of(rank) for rank, layout in enumerate(layouts)], mask)
        for source in range(4):
            if source != reader:
                sent[source] += sum(part.stop - part.start for part in owners.needed(reader, source))
    for rank, answer in enumerate(answers):
        # Forward and backward the keys of others, and backward the gradients of its own that others have seen.
        want = (2 * keys[rank] + sent[rank]) * each
        assert answer[0][5].get("exchange", 0) == want, rank
    if calls is not None:
        assert [answer[0][4] for answer in answers] == calls


case_lists = st.lists(
    st.tuples(
        packings(),
        st.sampled_from(ORDERS),
        st.sampled_from(schedules(4)),
        st.builds(IntervalMask, st.booleans(), st.none() | st.integers(1, 30)),
    ),
    min_size=8,
    max_size=8,
)


@few_examples
@given(cases=case_lists)
def test_documents_that_begin_and_end_anywhere_equal_one_rank(ranks, cases):
    compare(ranks.run(on_rank, cases, torch.float64, 2, HEADS, size=4), cases, 4, torch.float64, 1e-10)


@pytest.mark.slow
@many_examples
@given(cases=case_lists)
def test_eight_ranks_equal_one_rank(eight_ranks, cases):
    compare(eight_ranks.run(on_rank, cases, torch.float64, 2, (8, 2)), cases, 8, torch.float64, 1e-10)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_balances_the_causal_work_of_one_document(size):
    def spread(order):
        work = [score_elements(Layout((0, 4096), order, size, rank)) for rank in range(size)]
        return max(work) / (sum(work) / size)

    assert spread("zigzag") == 1.0
    assert spread("contiguous") > 1.4


def refused(q, k, v, layout, schedule="ring"):
    with pytest.raises(ValueError, match=r"attention|window|Ulysses") as caught:
        softmax_attention(q, k, v, layout, 1.0, schedule=schedule)
    return str(caught.value)


def test_wrong_arguments_are_refused():
    q, k, v, _ = draw(8)
    assert "8 tokens, but the layout gives this rank 4" in refused(q, k, v, Layout((0, 4)))
    assert "do not fit: expected [B, T, H, K]" in refused(q, k[:, :4], v, Layout((0, 8)))
    assert "8 query heads are not a multiple of 3" in refused(q, q[:, :, :3], q[:, :, :3], Layout((0, 8)))
    assert "whose keys are not here" in refused(q, k, v, Layout((0, 8), past_tokens=3))
    assert "no schedule 'star'; choose one of all-gather, ring" in refused(q, k, v, Layout((0, 8)), "star")
    with pytest.raises(ValueError, match="a window of 0 holds no token"):
        IntervalMask(window=0)


def too_many_ranks():
    layout = Layout.on(Mesh.build("cpu", cp=4), (0, 8), "contiguous")
    q, k, v, _ = (layout.shard(x) for x in draw(8, heads=(6, 2)))
    return refused(q, k, v, layout, "ulysses"), refused(q, k, v, layout, "ulysses-ring")


def test_heads_that_do_not_divide_over_ulysses_ranks_are_refused_with_what_does(ranks):
    for one, grid_missing in ranks.run(too_many_ranks, size=4):
        assert "6 query heads do not divide over 4 ranks (6 = 1 x 4 + 2); use 'ulysses-ring' with groups of 2" in one
        assert "needs a mesh whose cp axis is ulysses x ring" in grid_missing

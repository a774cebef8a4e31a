"""Ring attention: the plan of its steps, the rows that travel, and its values against the whole score matrix."""

import itertools

import pytest
import torch
import torch.distributed as dist

from longctx.kernels.attention import reference
from longctx.kernels.attention.masks import CAUSAL_MASK, IntervalMask
from longctx.parallel.attention.ring import RingSchedule, plan_steps
from longctx.parallel.attention.visibility import KVOwners, row_count
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import count_traffic
from tests.combinations import pairs
from tests.parallel.cases import ORDERS, layout_here

CPU = torch.device("cpu")
BATCH, HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 2, 3, 5
SCALE = 0.3
BOUNDS = [(0, 32), (0, 5, 6, 21, 43), (0, 1, 3)]
MASKS = [CAUSAL_MASK, IntervalMask(window=6), IntervalMask(causal=False, window=3)]
each_order = pytest.mark.parametrize("order", ORDERS)


def dense_mask(bounds, mask):
    """The whole mask `[T, T]`, written from its definition."""
    places = torch.arange(bounds[-1])
    documents = torch.bucketize(places, torch.tensor(bounds[1:]), right=True)
    distance = places[:, None] - places
    seen = documents[:, None] == documents
    if mask.causal:
        seen &= distance >= 0
    return seen if mask.window is None else seen & (distance.abs() < mask.window)


def owners_of(bounds, order, size, mask):
    return KVOwners.of(Layout(bounds, order, size), 1, mask)


@each_order
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_visible_key_is_received_once_and_no_other(order, size):
    for bounds, mask in itertools.product(BOUNDS, MASKS):
        owners, seen = owners_of(bounds, order, size, mask), dense_mask(bounds, mask)
        for index in range(size):
            queries = owners.tokens(index)
            keys = torch.cat([step.keys for step in plan_steps(owners, index, CPU)])
            want = seen[queries[queries < bounds[-1]]].any(dim=0).nonzero()[:, 0]
            assert torch.equal(keys.sort().values, want), (bounds, mask, index)


@each_order
def test_what_an_owner_sends_is_what_its_target_receives_in_the_same_step(order):
    owners = owners_of((0, 5, 6, 21, 43), order, 4, IntervalMask(window=6))
    plans = [plan_steps(owners, index, CPU) for index in range(4)]
    for index, distance in itertools.product(range(4), range(4)):
        step = plans[index][distance]
        assert (step.target, step.source) == ((index + distance) % 4, (index - distance) % 4)
        assert step.sent == plans[step.target][distance].received
        assert row_count(step.received) == len(step.keys)


@pytest.mark.parametrize(("window", "reached"), [(1, 1), (2, 2), (9, 2), (10, 3), (17, 3), (18, 4)])
def test_a_window_reaches_only_the_neighbours_that_it_covers(window, reached):
    owners = owners_of((0, 32), "contiguous", 4, IntervalMask(window=window))
    # The last owner: 8 keys of its own, and the window - 1 keys before its first query.
    steps = plan_steps(owners, 3, CPU)
    assert [bool(step.received) for step in steps] == [distance < reached for distance in range(4)]
    assert sum(len(step.keys) for step in steps[1:]) == window - 1


def test_documents_that_end_with_the_pieces_do_not_travel():
    owners = owners_of((0, 8, 16, 24, 32), "contiguous", 4, CAUSAL_MASK)
    for index in range(4):
        own, *others = plan_steps(owners, index, CPU)
        assert own.sent == own.received == (slice(0, 8),)
        # The steps remain, so that all owners exchange at the same distance.
        assert len(others) == 3
        assert all(step.sent == step.received == () and step.block is None for step in others)


def draw(length):
    generator = torch.Generator().manual_seed(length)
    shapes = [(HEADS, KEY_DIM), (KV_HEADS, KEY_DIM), (KV_HEADS, VALUE_DIM), (HEADS, VALUE_DIM)]
    return [torch.randn(BATCH, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend(cases):
    answers = []
    for bounds, order, mask in cases:
        layout = layout_here(bounds, order)
        owners = KVOwners.of(layout, 1, mask)
        ring = RingSchedule.of(owners, layout.rank, layout.comm_group, CPU)
        q, k, v, do = map(layout.shard, draw(bounds[-1]))
        with count_traffic() as forward:
            out, lse = ring.forward(q, k, v, SCALE)
        with count_traffic() as backward:
            grads = ring.backward(do, q, k, v, out, lse, SCALE)
        answers.append((out, lse.transpose(1, 2), *grads, forward.bytes["exchange"], backward.bytes["exchange"]))
    return answers


def test_the_ring_equals_the_whole_score_matrix_and_receives_only_visible_rows(ranks):
    size = 3
    cases = pairs(BOUNDS, ORDERS, MASKS)
    for case, *parts in zip(cases, *ranks.run(attend, cases, size=size), strict=True):
        bounds, order, mask = case
        layout = Layout(bounds, order, size)
        q, k, v, do = draw(bounds[-1])
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = reference.softmax_attention(*leaves, dense_mask(bounds, mask), SCALE)
        out.backward(do)
        refs = out.detach(), lse.detach().transpose(1, 2), *(x.grad for x in leaves)
        *tensors, forward, backward = zip(*parts, strict=True)
        for shards, want in zip(tensors, refs, strict=True):
            torch.testing.assert_close(layout.unshard(shards), want, rtol=1e-10, atol=1e-10)
        owners = KVOwners.of(layout, 1, mask)
        row = BATCH * KV_HEADS * (KEY_DIM + VALUE_DIM) * 8
        for rank in range(size):
            others = [other for other in range(size) if other != rank]
            read = row * sum(row_count(owners.needed(rank, other)) for other in others)
            returned = row * sum(row_count(owners.needed(other, rank)) for other in others)
            assert (forward[rank], backward[rank]) == (read, read + returned), case


def attend_at(places):
    layout = layout_here((0, 9, 24), "zigzag")
    ring = RingSchedule.of(KVOwners.of(layout, 1, CAUSAL_MASK), layout.rank, layout.comm_group, CPU)
    q, k, v, _ = draw(24)
    own = places[dist.get_rank()]
    index = own.clamp_min(0).transpose(1, 2)[..., None].expand(-1, -1, -1, KEY_DIM)
    return ring.routed(own).forward(q[:, :, :KV_HEADS].gather(1, index), *map(layout.shard, (k, v)), SCALE)


def test_each_head_has_its_own_queries_and_a_place_of_minus_one_sees_nothing(ranks):
    # Rank 0 has the tokens 0 to 5 and 18 to 23, rank 1 those between.
    places = torch.tensor([[[[0, 3, 20], [-1, 5, 23]]] * BATCH, [[[-1, -1, 8], [9, 9, 17]]] * BATCH])
    q, k, v, _ = draw(24)
    out, lse = reference.softmax_attention(q[:, :, :KV_HEADS], k, v, dense_mask((0, 9, 24), CAUSAL_MASK), SCALE)
    for own, (routed_out, routed_lse) in zip(places, ranks.run(attend_at, places, size=2), strict=True):
        for head in range(KV_HEADS):
            rows = own[0, head]
            want = torch.where((rows < 0)[:, None], 0.0, out[:, rows, head])
            torch.testing.assert_close(routed_out[:, :, head], want, rtol=1e-10, atol=1e-10)
            want = torch.where(rows < 0, float("-inf"), lse[:, head, rows])
            torch.testing.assert_close(routed_lse[:, head], want, rtol=1e-10, atol=1e-10)

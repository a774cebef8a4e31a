"""Transfers of key and value rows between two ranks, and of their gradients back."""

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.attention.kv_transfer import add_rows_, start_transfer, take_rows
from longctx.parallel.traffic import count_traffic

PARTS = [(), (slice(2, 5),), (slice(0, 1), slice(3, 4), slice(6, 9))]
each_parts = pytest.mark.parametrize("parts", PARTS)


def draw(seed, rows=9):
    """Keys and values of 2 heads, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, rows, 2, size, generator=generator, dtype=torch.float64) for size in (3, 5))


def rows_of(parts):
    return [row for part in parts for row in range(part.start, part.stop)]


@each_parts
def test_rows_are_taken_slice_after_slice(parts):
    for x, taken in zip(draw(0), take_rows(draw(0), parts), strict=True):
        assert torch.equal(taken, x[:, rows_of(parts)])


def test_one_slice_is_a_view():
    both = draw(0)
    for x, taken in zip(both, take_rows(both, (slice(2, 5),)), strict=True):
        assert taken.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@each_parts
def test_rows_are_added_where_they_were_taken_and_nowhere_else(parts):
    sums, before = draw(0), draw(0)
    added = draw(1, len(rows_of(parts)))
    add_rows_(sums, parts, added)
    for got, old, rows in zip(sums, before, added, strict=True):
        want = old.clone()
        for n, row in enumerate(rows_of(parts)):
            want[:, row] += rows[:, n]
        assert torch.equal(got, want)


def rows_sent(rank):
    """Rank 0 sends 3 slices, rank 1 one, rank 2 nothing."""
    return PARTS[2 - rank]


def send_to_the_next():
    rank, size = dist.get_rank(), dist.get_world_size()
    source = (rank - 1) % size
    with count_traffic() as traffic:
        transfer = start_transfer(
            draw(rank),
            target=(rank + 1) % size,
            sent=rows_sent(rank),
            source=source,
            received=len(rows_of(rows_sent(source))),
            group=dist.group.WORLD,
            tag=0,
        )
        keys, values = transfer.wait()
    return keys, values, dict(traffic.calls), traffic.bytes["exchange"]


def test_the_rows_of_the_source_arrive_in_one_message_and_no_rows_are_no_message(ranks):
    for rank, (keys, values, calls, received) in enumerate(ranks.run(send_to_the_next, size=3)):
        source = (rank - 1) % 3
        rows = rows_of(rows_sent(source))
        want = [x[:, rows] for x in draw(source)]
        assert torch.equal(keys, want[0])
        assert torch.equal(values, want[1])
        assert received == 2 * len(rows) * 2 * (3 + 5) * 8
        assert calls == {"exchange": 1}


def exchange_no_rows():
    other = 1 - dist.get_rank()
    with count_traffic() as traffic:
        both = draw(0)
        transfer = start_transfer(both, target=other, sent=(), source=other, received=0, group=dist.group.WORLD, tag=0)
        keys, values = transfer.wait()
    return list(keys.shape), list(values.shape), dict(traffic.calls)


def test_without_rows_nothing_is_exchanged(ranks):
    assert ranks.run(exchange_no_rows, size=2) == [([2, 0, 2, 3], [2, 0, 2, 5], {})] * 2


def wait_in_reverse():
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    # The ranks start the two kinds of messages in opposite orders, and wait for them in opposite orders.
    tags = [0, 1] if rank == 0 else [1, 0]
    transfers = {
        tag: start_transfer(
            draw(10 * rank + tag),
            target=other,
            sent=(slice(0, 9),),
            source=other,
            received=9,
            group=dist.group.WORLD,
            tag=tag,
        )
        for tag in tags
    }
    return {tag: transfers[tag].wait() for tag in reversed(tags)}


def test_messages_of_two_tags_are_not_confused(ranks):
    for rank, arrived in enumerate(ranks.run(wait_in_reverse, size=2)):
        for tag in (0, 1):
            for got, want in zip(arrived[tag], draw(10 * (1 - rank) + tag), strict=True):
                assert torch.equal(got, want)

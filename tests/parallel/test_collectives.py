"""Collectives: what each rank gets, what is counted, and what an error names."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.collectives import (
    CollectiveError,
    Pending,
    all_gather,
    all_gather_dict,
    all_reduce,
    all_to_all,
    all_to_all_rows,
    exchange,
    reduce_scatter,
)
from longctx.parallel.mesh import Axis
from longctx.parallel.traffic import count_traffic, layer

SIZE = 3


def draw(rank, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def counted(call):
    with count_traffic() as traffic:
        result = call()
    return result, dict(traffic.calls), dict(traffic.bytes)


def gather():
    # Transposed: not contiguous.
    return counted(lambda: all_gather(draw(dist.get_rank(), 4, 2).T).wait())


def test_all_gather_stacks_the_ranks_in_order(ranks):
    want = torch.stack([draw(rank, 4, 2).T for rank in range(SIZE)])
    for got, calls, received in ranks.run(gather, size=SIZE):
        assert torch.equal(got, want)
        assert (calls, received) == ({"all_gather": 1}, {"all_gather": 2 * 8 * 8})


def scatter_sums():
    return counted(lambda: reduce_scatter(draw(dist.get_rank(), 4, SIZE).T, dist.group.WORLD).wait())


def test_reduce_scatter_gives_each_rank_its_row_of_the_sum(ranks):
    total = sum(draw(rank, 4, SIZE).T for rank in range(SIZE))
    for rank, (got, calls, received) in enumerate(ranks.run(scatter_sums, size=SIZE)):
        torch.testing.assert_close(got, total[rank], rtol=1e-14, atol=1e-14)
        assert (calls, received) == ({"reduce_scatter": 1}, {"reduce_scatter": 2 * 4 * 8})


def reduce():
    x = draw(dist.get_rank(), 6)
    total, calls, received = counted(lambda: all_reduce(x))
    return x, total is x, calls, received


def test_all_reduce_sums_in_place(ranks):
    want = sum(draw(rank, 6) for rank in range(SIZE))
    for x, same, calls, received in ranks.run(reduce, size=SIZE):
        torch.testing.assert_close(x, want, rtol=1e-14, atol=1e-14)
        assert same
        # A ring of 3 ranks: 2 of 3 parts received twice.
        assert (calls, received) == ({"all_reduce": 1}, {"all_reduce": 2 * 2 * 6 * 8 // 3})


def test_one_rank_reduces_nothing(ranks):
    [(x, same, calls, received)] = ranks.run(reduce, size=1)
    assert torch.equal(x, draw(0, 6))
    assert (same, calls, received) == (True, {}, {})


def merge_dicts():
    rank = dist.get_rank()
    own = {f"rank {rank}": rank, f"again {rank}": 10 * rank}
    return list(all_gather_dict(own, Axis.from_group(dist.group.WORLD)).items())


def test_dicts_are_merged_in_the_order_of_ranks(ranks):
    want = [item for rank in range(SIZE) for item in ((f"rank {rank}", rank), (f"again {rank}", 10 * rank))]
    assert ranks.run(merge_dicts, size=SIZE) == [want] * SIZE


def test_the_dict_of_one_rank_is_copied():
    own = {"a": 1}
    merged = all_gather_dict(own, Axis())
    assert merged == own
    assert merged is not own


COUNTS = [[1, 0, 2], [3, 1, 0], [0, 0, 2]]
"""Rows that each rank sends to each."""


def sends_and_receives(rank):
    return COUNTS[rank], [row[rank] for row in COUNTS]


def send_all():
    rank = dist.get_rank()
    sends, receives = sends_and_receives(rank)
    x = draw(rank, 2, sum(sends)).T  # rows that are not contiguous
    parts, sizes = list(x.split(sends)), [2 * n for n in receives]
    flat = counted(lambda: all_to_all(parts, sizes, dist.group.WORLD).wait())
    rows = counted(lambda: all_to_all_rows(x, sends, receives, dist.group.WORLD).wait())
    return flat, rows


def test_all_to_all_delivers_uneven_parts_in_the_order_of_ranks(ranks):
    for rank, (flat, rows) in enumerate(ranks.run(send_all, size=SIZE)):
        want = [draw(s, 2, sum(COUNTS[s])).T.split(COUNTS[s])[rank] for s in range(SIZE)]
        assert [part.tolist() for part in flat[0]] == [part.flatten().tolist() for part in want]
        assert torch.equal(rows[0], torch.cat(want))
        received = 2 * 8 * sum(COUNTS[s][rank] for s in range(SIZE) if s != rank)
        assert flat[1:] == rows[1:] == ({"all_to_all": 1}, {"all_to_all": received})


def exchange_with_the_next():
    rank, group = dist.get_rank(), dist.group.WORLD
    after, before = (rank + 1) % SIZE, (rank - 1) % SIZE
    buffer = torch.empty(rank or SIZE, 2, dtype=torch.float64)
    sent = draw(rank, 2, after or SIZE).T
    result = counted(lambda: exchange({after: sent}, {before: buffer}, group).wait())
    empty = torch.empty(0)
    nothing = [counted(exchange(*pair, group).wait) for pair in (({}, {}), ({after: empty}, {before: empty}))]
    assert nothing == [(None, {}, {})] * 2
    return buffer, *result


def test_messages_between_two_ranks_fill_the_buffer_and_empty_ones_are_not_sent(ranks):
    for rank, (buffer, result, calls, received) in enumerate(ranks.run(exchange_with_the_next, size=SIZE)):
        rows = rank or SIZE
        assert torch.equal(buffer, draw((rank - 1) % SIZE, 2, rows).T)
        assert (result, calls, received) == (None, {"exchange": 1}, {"exchange": rows * 2 * 8})


BROKEN = RuntimeError("connection closed\nwith a second line")


def fail():
    """Errors of a start in a layer, of a wait outside of the layer that started it, and of a start outside of any."""
    work = mock.Mock()
    work.wait.side_effect = BROKEN

    def start():
        return all_to_all_rows(torch.zeros(3, 2, dtype=torch.float64), [1, 2], [1, 2], dist.group.WORLD)

    messages = []

    def note(call):
        with pytest.raises(CollectiveError) as caught:
            call()
        assert caught.value.__cause__ is BROKEN
        messages.append(str(caught.value))

    with mock.patch.object(dist, "all_to_all_single", side_effect=BROKEN), count_traffic() as traffic:
        with layer("blocks.3"):
            note(start)
            started = Pending("all_gather of [4] float64 over 2 ranks", [work], None, None)
        note(started.wait)
        note(start)
    return messages, dict(traffic.calls)


def test_an_error_names_the_layer_the_collective_and_the_rank(ranks):
    for rank, (messages, calls) in enumerate(ranks.run(fail, size=2)):
        failed = f"over 2 ranks on rank {rank} failed: connection closed"
        assert messages == [
            f"layer blocks.3: all_to_all of [6] float64 {failed}",
            f"layer blocks.3: all_gather of [4] float64 {failed}",
            f"all_to_all of [6] float64 {failed}",
        ]
        assert calls == {}

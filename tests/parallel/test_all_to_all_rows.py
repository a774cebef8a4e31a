"""Rows with uneven counts: each reaches its rank, and its gradient returns."""

import torch
import torch.distributed as dist

from longctx.parallel.all_to_all_rows import exchange_counts, exchange_rows
from longctx.parallel.mesh import Axis
from longctx.parallel.traffic import count_traffic, layer

COUNTS = torch.tensor([[2, 0, 3], [0, 1, 4], [0, 0, 0]])
"""Rows that each rank sends to each; the last one sends none."""
WIDTH = 5


def draw(rank, count):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def send_rows():
    axis = Axis.from_group(dist.group.WORLD)
    sends, receives = COUNTS[axis.rank].tolist(), COUNTS[:, axis.rank].tolist()
    x = draw(axis.rank, sum(sends)).requires_grad_()
    with count_traffic() as traffic:
        with layer("moe"):
            out = exchange_rows(x, sends, receives, axis)
        # The gradient of half a sum of squares: the received rows, which return to their senders.
        (out.square().sum() / 2).backward()
    assert torch.equal(x.grad, x)
    return out.detach(), dict(traffic.layers["moe"].calls), traffic.received


def test_rows_arrive_in_the_order_of_ranks_and_gradients_return(ranks):
    for rank, (out, calls, received) in enumerate(ranks.run(send_rows, size=3)):
        sent = [draw(s, int(COUNTS[s].sum())).split(COUNTS[s].tolist()) for s in range(3)]
        assert torch.equal(out, torch.cat([parts[rank] for parts in sent]))
        others = [s for s in range(3) if s != rank]
        rows = int(COUNTS[others, rank].sum() + COUNTS[rank, others].sum())
        assert calls == {"all_to_all": 2}
        assert received == rows * WIDTH * 8


def send_counts():
    axis = Axis.from_group(dist.group.WORLD)
    counts = torch.arange(axis.size * 2).view(axis.size, 2) + 100 * axis.rank
    return exchange_counts(counts, axis)


def test_row_r_of_the_counts_goes_to_rank_r(ranks):
    for rank, got in enumerate(ranks.run(send_counts, size=4)):
        assert got.dtype == torch.int64
        assert got.tolist() == [[100 * source + 2 * rank, 100 * source + 2 * rank + 1] for source in range(4)]


def test_one_rank_keeps_its_rows_and_counts():
    x, counts = draw(0, 3), torch.tensor([[3]])
    assert exchange_rows(x, [3], [3], Axis()) is x
    assert exchange_counts(counts, Axis()) is counts

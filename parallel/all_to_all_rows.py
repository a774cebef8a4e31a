"""All-to-all of rows with uneven counts, differentiable: the dispatch and combine of expert parallelism."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_to_all_rows
from longctx.parallel.mesh import Axis


def _exchange(x: Tensor, sends: Sequence[int], receives: Sequence[int], axis: Axis) -> Tensor:
    assert axis.group is not None
    return all_to_all_rows(x, sends, receives, axis.group).wait()


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, sends: list[int], receives: list[int], axis: Axis) -> Tensor:
        ctx.plan = receives, sends, axis
        return _exchange(x, sends, receives, axis)

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], *ctx.plan), None, None, None


def exchange_rows(x: Tensor, sends: Sequence[int], receives: Sequence[int], axis: Axis) -> Tensor:
    """Send rows to the ranks of an axis and return the received rows, `[sum(receives), D]`, in rank order.

    x `[sum(sends), D]`: the first sends[0] rows go to rank 0 of the axis, the next sends[1] to rank 1, and so on;
    receives[r] is the number of rows that rank r sends to this one. Differentiable: the backward pass is the inverse
    all-to-all.
    """
    if axis.group is None:
        return x
    return _ExchangeRows.apply(x, list(sends), list(receives), axis)  # type: ignore[no-untyped-call]


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """All-to-all of n counts per pair of ranks, `[W, n]` int64 to the same: row r goes to rank r of the axis, and row r
    of the result comes from rank r. Every rank has to call it."""
    if axis.group is None:
        return counts
    ones = [1] * axis.size
    return all_to_all_rows(counts, ones, ones, axis.group).wait()

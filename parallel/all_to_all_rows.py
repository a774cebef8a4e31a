"""Rows that change ranks, each sending each other one as many as it likes: the all-to-all of expert parallelism."""

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
    """The rows that the ranks of an axis have for this one, `[sum(receives), D]`, in the order of ranks.

    x `[sum(sends), D]`: the first sends[0] rows go to rank 0 of the axis, the next to rank 1, and so on; every rank's
    `receives` are what the others send it. Differentiable: gradients go back where the rows came from.
    """
    if axis.group is None:
        return x
    return _ExchangeRows.apply(x, list(sends), list(receives), axis)  # type: ignore[no-untyped-call]


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """`[W, n]`: for each rank of an axis the n counts that it has for this one. counts `[W, n]` int64 are this rank's
    for each rank; a collective that every rank calls."""
    if axis.group is None:
        return counts
    ones = [1] * axis.size
    return all_to_all_rows(counts, ones, ones, axis.group).wait()

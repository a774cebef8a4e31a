"""Channels that lie over ranks, for what every rank has to read whole."""

from typing import Any

import torch
from torch import Tensor

from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_gather, reduce_scatter
from longctx.parallel.mesh import Axis


class _GatherChannels(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        assert axis.group is not None
        return all_gather(x, axis.group).wait().movedim(0, -2).flatten(-2)

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        each = grads[0].unflatten(-1, (ctx.axis.size, -1)).movedim(-2, 0)
        return reduce_scatter(each, ctx.axis.group).wait(), None


def gather_channels(x: Tensor, axis: Axis) -> Tensor:
    """The channels of all ranks of an axis, in the order of ranks: `[..., C / W]` to `[..., C]`.

    What is made of the result is a summand of the loss on each rank. Differentiable in x, every rank of the axis taking
    part.
    """
    if axis.group is None:
        return x
    return _GatherChannels.apply(x, axis)  # type: ignore[no-untyped-call]

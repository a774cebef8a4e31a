"""All-gather of channels over tensor-parallel ranks, for computations that need every channel on every rank."""

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
        by_rank = grads[0].unflatten(-1, (ctx.axis.size, -1)).movedim(-2, 0)
        return reduce_scatter(by_rank, ctx.axis.group).wait(), None


def gather_channels(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate the channels of all ranks of an axis, in rank order: `[..., C / W]` to `[..., C]`.

    The backward pass sums the gradients over ranks (reduce-scatter): each rank's use of the result is one summand of
    the loss. Differentiable in x; every rank of the axis has to call it.
    """
    if axis.group is None:
        return x
    return _GatherChannels.apply(x, axis)  # type: ignore[no-untyped-call]

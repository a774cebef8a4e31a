"""Tensor-parallel RMSNorm: normalises over channels that are sharded over ranks."""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import rms_norm
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_reduce
from longctx.parallel.mesh import Axis


def _channel_sum(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce(x.sum(dim=-1, keepdim=True), axis.group)


class _TensorParallelRMSNorm(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, axis: Axis) -> Tensor:
        wide = x.to(accumulation_dtype(x.dtype))
        inverse = (_channel_sum(wide.square(), axis) / (x.shape[-1] * axis.size) + eps).rsqrt()
        ctx.save_for_backward(x, scale, inverse)
        ctx.axis = axis
        return (wide * inverse * scale).to(x.dtype)

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grads[0].to(inverse.dtype)
        normed, dnormed = wide * inverse, grad * scale
        mean = _channel_sum(dnormed * normed, ctx.axis) / (x.shape[-1] * ctx.axis.size)
        dscale = grad * normed
        if scale.dim() == 1:
            dscale = dscale.flatten(0, -2).sum(dim=0)
        return ((dnormed - normed * mean) * inverse).to(x.dtype), dscale.to(scale.dtype), None, None


def tensor_parallel_rms_norm(x: Tensor, scale: Tensor, eps: float, axis: Axis) -> Tensor:
    """Apply `longctx.kernels.pointwise.rms_norm` over the channels of all ranks of an axis; returns this rank's shard.

    Shapes: x `[..., D / W]`, scale `[D / W]` or like x, this rank's shard of each. Two all-reduces of one number per
    token, one forward and one backward. Differentiable in x and scale; every rank of the axis has to call it.
    """
    if axis.group is None:
        return rms_norm(x, scale, eps)
    return _TensorParallelRMSNorm.apply(x, scale, eps, axis)  # type: ignore[no-untyped-call]

"""RMSNorm and SwiGLU: per-token operators, computed in tiles that stay in cache.

On a CPU every elementwise operator on a long sequence reads and writes main memory, and every temporary needs fresh
pages from the system; tiles avoid both (2.5 to 6 times faster than torch's operators: benchmarks/README.md). On other
devices one tile covers the whole tensor. Computed in the accumulation dtype and cast once; only the inputs are saved
for the backward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype

TILE_ELEMENTS = 2**18
"""Elements per tile on a CPU: 1 MiB in float32, half of a core's L2 cache."""


def _tiles(x: Tensor) -> Iterator[slice]:
    """Split the rows of `x [R, D]` into tiles."""
    rows, width = x.shape
    step = max(1, TILE_ELEMENTS // max(width, 1)) if x.device.type == "cpu" else max(rows, 1)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[:, None]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        rows, width = x.reshape(-1, x.shape[-1]), x.shape[-1]
        scales = scale if scale.dim() == 1 else scale.reshape(-1, width)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        out_rows = out.view(-1, width)
        for tile in _tiles(rows):
            wide = rows[tile].to(dtype)
            inverse = _row_dot(wide, wide).div_(width).add_(eps).rsqrt_()
            out_rows[tile] = (wide * inverse).mul_(scales if scale.dim() == 1 else scales[tile])
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        width, dtype = x.shape[-1], accumulation_dtype(x.dtype)
        rows, grad_rows = x.reshape(-1, width), grads[0].reshape(-1, width)
        per_channel = scale.dim() == 1
        scales = scale if per_channel else scale.reshape(-1, width)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dscale = x.new_empty(0 if per_channel else x.shape)
        dchannel = torch.zeros(width, dtype=dtype, device=x.device)
        for tile in _tiles(rows):
            wide, grad = rows[tile].to(dtype), grad_rows[tile].to(dtype)
            inverse = _row_dot(wide, wide).div_(width).add_(ctx.eps).rsqrt_()
            normed = wide * inverse
            if per_channel:
                dchannel += (grad * normed).sum(dim=0)
            else:
                dscale.view(-1, width)[tile] = grad * normed
            dnormed = grad * (scales if per_channel else scales[tile])
            mean = _row_dot(dnormed, normed).div_(width)
            dx.view(-1, width)[tile] = (dnormed - normed.mul_(mean)).mul_(inverse)
        return dx, dchannel.to(scale.dtype) if per_channel else dscale, None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute `x * rsqrt(mean(x^2) + eps) * scale` over the last dim (Zhang & Sennrich 2019), in x's dtype.

    Shapes: x `[..., D]`; scale `[D]` (a weight) or `[..., D]` like x (a gate).
    """
    if scale.shape != x.shape and scale.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: scale has shape {list(scale.shape)}: expected that of x, {list(x.shape)}, or [{x.shape[-1]}]"
        )
    return _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        dtype, hidden = accumulation_dtype(gate_up.dtype), gate_up.shape[-1] // 2
        rows = gate_up.reshape(-1, 2 * hidden)
        out = gate_up.new_empty(*gate_up.shape[:-1], hidden)
        for tile in _tiles(rows):
            gate, up = rows[tile].to(dtype).chunk(2, dim=-1)
            out.view(-1, hidden)[tile] = torch.sigmoid(gate).mul_(gate).mul_(up)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        dtype, hidden = accumulation_dtype(gate_up.dtype), gate_up.shape[-1] // 2
        rows, grad_rows = gate_up.reshape(-1, 2 * hidden), grads[0].reshape(-1, hidden)
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        out_rows = out.view(-1, 2 * hidden)
        for tile in _tiles(rows):
            gate, up = rows[tile].to(dtype).chunk(2, dim=-1)
            grad = grad_rows[tile].to(dtype)
            sigmoid = torch.sigmoid(gate)
            silu = sigmoid * gate
            out_rows[tile, hidden:] = grad * silu
            # d silu(g) / dg = sigmoid(g) + silu(g) (1 - sigmoid(g))
            out_rows[tile, :hidden] = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid).mul_(up).mul_(grad)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute `SiLU(gate) * up` (Shazeer 2020), `[..., F]`, from `gate_up [..., 2 F]`, the gates in the first half."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dim of gate_up is gates and values: {gate_up.shape[-1]} has to be even")
    return _Swiglu.apply(gate_up)  # type: ignore[no-untyped-call]

"""The gated feed-forward of one or of many experts, in tiles of rows: no tensor of size tokens x hidden width exists
(ALST's tiled MLP).

The backward pass makes the hidden activations again, tile by tile, and sums the weights' gradients in the accumulation
dtype over tiles, cast once: the same numbers as without tiles, where a sum over tiles in bf16 would not be. Without
tiles the activations are kept.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import swiglu
from longctx.kernels.routed.grouped_gemm import outer_products, rows_times


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, tile: int | None) -> Tensor:
        out = x.new_empty(x.shape[0], down.shape[1])
        whole = None
        for begin in range(0, len(x), tile or max(1, len(x))):
            at = slice(begin, begin + (tile or len(x)))
            inside = _inside(ends, begin, len(x[at]))
            hidden = rows_times(x[at], gate_up.transpose(1, 2), inside)
            out[at] = rows_times(swiglu(hidden), down.transpose(1, 2), inside)
            whole = hidden if tile is None else None
        ctx.save_for_backward(x, ends, gate_up, down, whole)
        ctx.tile = tile
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, gate_up, down, whole = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        dgate_up = torch.zeros(gate_up.shape, dtype=dtype, device=x.device)
        ddown = torch.zeros(down.shape, dtype=dtype, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for begin in range(0, len(x), ctx.tile or max(1, len(x))):
            at = slice(begin, begin + (ctx.tile or len(x)))
            part, grad = x[at], grads[0][at]
            inside = _inside(ends, begin, len(part))
            hidden = rows_times(part, gate_up.transpose(1, 2), inside) if whole is None else whole
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                acted = swiglu(hidden)
            ddown += outer_products(grad, acted.detach(), inside)
            (dhidden,) = torch.autograd.grad(acted, hidden, rows_times(grad, down, inside))
            dgate_up += outer_products(dhidden, part, inside)
            dx[at] = rows_times(dhidden, gate_up, inside)
        return dx, None, dgate_up.to(gate_up.dtype), ddown.to(down.dtype), None


def _inside(ends: Tensor, begin: int, size: int) -> Tensor:
    """Where the groups end in the `size` rows from `begin` on."""
    return (ends - begin).clamp_(0, size)


def grouped_swiglu(x: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, tile: int | None = None) -> Tensor:
    """`(SiLU(x_e W_gate^T) * (x_e W_up^T)) W_down^T` (Shazeer 2020) for the rows x_e of each of E experts: `[N, D]`.

    Shapes: x `[N, D]`, sorted by expert; ends `[E]` int32, the row after each expert's last one; gate_up `[E, 2 F, D]`
    with the gates first, down `[E, D, F]`. `tile` rows have their hidden activations in memory at one time, all where
    None. Differentiable in x and the weights; an expert without rows has gradients of zero.
    """
    return _GroupedSwiglu.apply(x, ends, gate_up, down, tile)  # type: ignore[no-untyped-call]


def tiled_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, tile: int) -> Tensor:
    """The same of one expert that all rows come to: x `[..., D]`, gate_up `[2 F, D]`, down `[D, F]`: `[..., D]`."""
    rows = x.reshape(-1, x.shape[-1])
    ends = torch.tensor([len(rows)], dtype=torch.int32, device=x.device)
    return grouped_swiglu(rows, ends, gate_up[None], down[None], tile).view(*x.shape[:-1], down.shape[0])

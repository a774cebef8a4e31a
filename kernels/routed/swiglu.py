"""Tiled SwiGLU of one or many experts: no tensor of size tokens x hidden width exists (ALST's tiled MLP).

The backward pass recomputes the hidden activations tile by tile and sums the weights' gradients over tiles in the
accumulation dtype, cast once: the same result as without tiles, unlike a sum over tiles in bf16. Without tiles the
activations are kept.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import swiglu
from longctx.kernels.routed.grouped_gemm import grouped_matmul, grouped_outer_product


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(
        ctx: Any, x: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, tile: int | None, computed: bool
    ) -> Tensor:
        out = x.new_empty(x.shape[0], down.shape[1])
        saved_hidden = None
        # What the backward pass needs with tiles are the inputs.
        for begin in range(0, len(x) if computed or tile is None else 0, tile or max(1, len(x))):
            rows = slice(begin, begin + (tile or len(x)))
            tile_ends = _tile_ends(ends, begin, len(x[rows]))
            hidden = grouped_matmul(x[rows], gate_up.transpose(1, 2), tile_ends)
            out[rows] = grouped_matmul(swiglu(hidden), down.transpose(1, 2), tile_ends)
            saved_hidden = hidden if tile is None else None
        ctx.save_for_backward(x, ends, gate_up, down, saved_hidden)
        ctx.tile = tile
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, gate_up, down, saved_hidden = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        dgate_up = torch.zeros(gate_up.shape, dtype=dtype, device=x.device)
        ddown = torch.zeros(down.shape, dtype=dtype, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for begin in range(0, len(x), ctx.tile or max(1, len(x))):
            rows = slice(begin, begin + (ctx.tile or len(x)))
            x_tile, grad = x[rows], grads[0][rows]
            tile_ends = _tile_ends(ends, begin, len(x_tile))
            hidden = saved_hidden
            if hidden is None:
                hidden = grouped_matmul(x_tile, gate_up.transpose(1, 2), tile_ends)
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                activated = swiglu(hidden)
            ddown += grouped_outer_product(grad, activated.detach(), tile_ends)
            (dhidden,) = torch.autograd.grad(activated, hidden, grouped_matmul(grad, down, tile_ends))
            dgate_up += grouped_outer_product(dhidden, x_tile, tile_ends)
            dx[rows] = grouped_matmul(dhidden, gate_up, tile_ends)
        return dx, None, dgate_up.to(gate_up.dtype), ddown.to(down.dtype), None, None


def _tile_ends(ends: Tensor, begin: int, size: int) -> Tensor:
    """Return the groups' ends relative to a tile of `size` rows that starts at `begin`."""
    return (ends - begin).clamp_(0, size)


def grouped_swiglu(x: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, tile: int | None = None) -> Tensor:
    """Compute `(SiLU(x_e W_gate^T) * (x_e W_up^T)) W_down^T` (Shazeer 2020) for the rows x_e of each expert: `[N, D]`.

    Shapes: x `[N, D]`, sorted by expert; ends `[E]` int32, the row after each expert's last one; gate_up `[E, 2 F, D]`
    with the gates first, down `[E, D, F]`. Hidden activations exist for `tile` rows at a time, for all rows if None.
    Differentiable in x and the weights; an expert without rows has gradients of zero.
    """
    return _GroupedSwiglu.apply(x, ends, gate_up, down, tile, True)  # type: ignore[no-untyped-call]


def tiled_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, tile: int, *, computed: bool = True) -> Tensor:
    """Compute a dense SwiGLU in tiles, `[..., D]`: x `[..., D]`, gate_up `[2 F, D]`, down `[D, F]`.

    Without `computed` the result is memory without contents: for a recomputation whose result nobody reads, and which
    only has to save what the backward pass needs.
    """
    rows = x.reshape(-1, x.shape[-1])
    ends = torch.full((1,), len(rows), dtype=torch.int32, device=x.device)  # a copy would make the host wait
    out: Tensor = _GroupedSwiglu.apply(  # type: ignore[no-untyped-call]
        rows, ends, gate_up[None], down[None], tile, computed
    )
    return out.view(*x.shape[:-1], down.shape[0])

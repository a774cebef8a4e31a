"""The gated feed-forward in tiles of tokens: no tensor of size tokens x hidden width exists (ALST's tiled MLP).

The backward pass makes the hidden activations again, tile by tile, and sums the weights' gradients in the accumulation
dtype over tiles, cast once: the same numbers as without tiles, where a sum over tiles in bf16 would not be.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels.pointwise import swiglu
from longctx.kernels.precision import exact_backward, exact_forward
from longctx.kernels.recurrence import accumulation_dtype


class _TiledSwiglu(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, tile: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = x.new_empty(*x.shape[:-1], down.shape[0])
        for part, done in zip(rows.split(tile), out.view(-1, down.shape[0]).split(tile), strict=True):
            done.copy_(torch.matmul(swiglu(torch.matmul(part, gate_up.T)), down.T))
        ctx.save_for_backward(x, gate_up, down)
        ctx.tile = tile
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down = ctx.saved_tensors
        dtype = accumulation_dtype(x.dtype)
        dgate_up = torch.zeros(gate_up.shape, dtype=dtype, device=x.device)
        ddown = torch.zeros(down.shape, dtype=dtype, device=x.device)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        pieces = (t.reshape(-1, t.shape[-1]).split(ctx.tile) for t in (x, grads[0], dx))
        for part, grad, dpart in zip(*pieces, strict=True):
            with torch.enable_grad():
                hidden = torch.matmul(part, gate_up.T).requires_grad_()
                acted = swiglu(hidden)
            ddown += torch.matmul(grad.T, acted.detach())
            (dhidden,) = torch.autograd.grad(acted, hidden, torch.matmul(grad, down))
            dgate_up += torch.matmul(dhidden.T, part)
            dpart.copy_(torch.matmul(dhidden, gate_up))
        return dx, dgate_up.to(gate_up.dtype), ddown.to(down.dtype), None


def tiled_swiglu(x: Tensor, gate_up: Tensor, down: Tensor, tile: int) -> Tensor:
    """`(SiLU(x W_gate^T) * (x W_up^T)) W_down^T` (Shazeer 2020), `tile` tokens at a time: `[..., D]`.

    Shapes: x `[..., D]`, gate_up `[2 F, D]` with the gates first, down `[D, F]`.
    """
    return _TiledSwiglu.apply(x, gate_up, down, tile)  # type: ignore[no-untyped-call]

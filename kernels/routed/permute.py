"""MoE token permutation: gather rows by expert, combine the experts' outputs with routing weights.

Both directions gather, with no atomic additions: the sums have the same order in every call.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype

BLOCK_ELEMENTS = 2**18
"""Elements per block of tokens on a CPU, so that its sum stays in cache."""


def _blocks(tokens: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(width, 1)) if device.type == "cpu" else max(tokens, 1)
    return (slice(begin, begin + step) for begin in range(0, tokens, step))


def _weighted_sum(rows: Tensor, slots: Tensor, weights: Tensor | None) -> Tensor:
    """Return `sum_j weights[t, j] rows[slots[t, j]]`, `[T, D]`: summed in the accumulation dtype and cast once."""
    tokens, width = len(slots), rows.shape[1]
    if not len(rows):
        return rows.new_zeros(tokens, width)
    dtype = accumulation_dtype(rows.dtype)
    out = rows.new_empty(tokens, width)
    valid = slots >= 0
    factors = valid.to(dtype) if weights is None else torch.where(valid, weights, 0).to(dtype)
    index = slots.clamp_min(0)
    for block in _blocks(tokens, width, rows.device):
        total = torch.zeros(len(out[block]), width, dtype=dtype, device=rows.device)
        for column in range(slots.shape[1]):
            total.addcmul_(rows.index_select(0, index[block, column]).to(dtype), factors[block, column, None])
        out[block] = total
    return out


class _Permute(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, tokens)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _weighted_sum(grads[0], ctx.saved_tensors[0], None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slots, weights)
        return _weighted_sum(rows, slots, weights)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, slots, weights = ctx.saved_tensors
        dweights = torch.zeros_like(weights)
        if not len(rows):
            return torch.zeros_like(rows), None, dweights
        dtype = accumulation_dtype(rows.dtype)
        valid = slots >= 0
        # Gradients of slots of -1 go to one extra row, which is dropped.
        drows = rows.new_zeros(len(rows) + 1, rows.shape[1])
        index = torch.where(valid, slots, len(rows))
        for block in _blocks(len(slots), rows.shape[1], rows.device):
            grad = grads[0][block].to(dtype)
            for column in range(slots.shape[1]):
                weight, block_index = weights[block, column, None].to(dtype), index[block, column]
                drows.index_copy_(0, block_index, (grad * weight).to(rows.dtype))
                selected = rows.index_select(0, block_index.clamp_max(len(rows) - 1)).to(dtype)
                dweights[block, column] = torch.linalg.vecdot(grad, selected).to(weights.dtype)
        return drows[:-1], None, torch.where(valid, dweights, 0)


def permute(x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """Gather the rows `tokens [N]` of x `[T, D]`: `[N, D]`. Differentiable in x.

    slots `[T, k]` (int64) is the inverse of `tokens`: the rows of the result that are copies of each row of x, -1 for
    none. The backward pass gathers by it.
    """
    return _Permute.apply(x, tokens, slots)  # type: ignore[no-untyped-call]


def combine(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_j weights[t, j] rows[slots[t, j]]`, `[T, D]`, in the dtype of `rows`.

    Shapes: rows `[N, D]`, slots (int64) and weights `[T, k]`. At most one slot refers to a row; a slot of -1 adds
    nothing. Summed in the accumulation dtype. Differentiable in rows and weights.
    """
    return _Combine.apply(rows, slots, weights)  # type: ignore[no-untyped-call]

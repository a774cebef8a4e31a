"""Rows that go to several places and come back: tokens sorted by their experts, and the weighted sum of what these say.

Both directions gather, and neither adds into rows that it shares: the same sums in the same order at every call.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype

BLOCK_ELEMENTS = 2**18
"""Elements of a block of tokens on a CPU, whose sum stays in cache."""


def _blocks(tokens: int, width: int, device: torch.device) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(width, 1)) if device.type == "cpu" else max(tokens, 1)
    return (slice(begin, begin + step) for begin in range(0, tokens, step))


def _sum(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_j weights[t, j] rows[places[t, j]]`, `[T, D]`, in the accumulation dtype and cast once."""
    tokens, width = len(places), rows.shape[1]
    if not len(rows):
        return rows.new_zeros(tokens, width)
    dtype = accumulation_dtype(rows.dtype)
    out = rows.new_empty(tokens, width)
    counts = places >= 0
    factors = counts.to(dtype) if weights is None else torch.where(counts, weights, 0).to(dtype)
    at = places.clamp_min(0)
    for block in _blocks(tokens, width, rows.device):
        total = torch.zeros(len(out[block]), width, dtype=dtype, device=rows.device)
        for column in range(places.shape[1]):
            total.addcmul_(rows.index_select(0, at[block, column]).to(dtype), factors[block, column, None])
        out[block] = total
    return out


class _Spread(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grads[0], ctx.saved_tensors[0], None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places, weights)
        return _sum(rows, places, weights)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, places, weights = ctx.saved_tensors
        dweights = torch.zeros_like(weights)
        if not len(rows):
            return torch.zeros_like(rows), None, dweights
        dtype = accumulation_dtype(rows.dtype)
        counts = places >= 0
        # What has no place goes into a row of its own, which is cut off.
        drows = rows.new_zeros(len(rows) + 1, rows.shape[1])
        at = torch.where(counts, places, len(rows))
        for block in _blocks(len(places), rows.shape[1], rows.device):
            grad = grads[0][block].to(dtype)
            for column in range(places.shape[1]):
                weight, into = weights[block, column, None].to(dtype), at[block, column]
                drows.index_copy_(0, into, (grad * weight).to(rows.dtype))
                read = rows.index_select(0, into.clamp_max(len(rows) - 1)).to(dtype)
                dweights[block, column] = torch.linalg.vecdot(grad, read).to(weights.dtype)
        return drows[:-1], None, torch.where(counts, dweights, 0)


def spread(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
    """`[N, D]`: the row of x `[T, D]` that each of `tokens [N]` names. Differentiable in x.

    places `[T, k]`, int64: the rows of the result that each row of x went to, -1 for none; the inverse of `tokens`.
    """
    return _Spread.apply(x, tokens, places)  # type: ignore[no-untyped-call]


def combine(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """`[T, D]`: `sum_j weights[t, j] rows[places[t, j]]`, of rows `[N, D]`, each of which has one place at most.

    places and weights `[T, k]`; a place of -1 counts nothing. Summed in the accumulation dtype, in rows' dtype.
    Differentiable in rows and weights.
    """
    return _Combine.apply(rows, places, weights)  # type: ignore[no-untyped-call]

"""Grouped GEMM: one matrix product per expert over rows that are sorted by expert.

Rows are sorted by group; `ends[e]` is the row after the last one of group e. `torch.nn.functional.grouped_mm` supports
float32, bfloat16 and float16 with rows of a multiple of 16 bytes; a loop of products computes the rest (float64, other
widths).
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype

_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = 16


def _aligned(*widths: int, dtype: torch.dtype) -> bool:
    return dtype in _GROUPED and all(width > 0 and width * dtype.itemsize % _BYTES == 0 for width in widths)


def grouped_matmul(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Return `x_e W_e` for the rows x_e of each group, `[N, F]`: x `[N, D]`, weights `[E, D, F]`, ends `[E]` int32."""
    if len(weights) == 1:
        return x @ weights[0]
    if len(x) and _aligned(*weights.shape[1:], dtype=x.dtype):
        return F.grouped_mm(x.contiguous(), weights, offs=ends)
    out = x.new_empty(len(x), weights.shape[2])
    for group, weight in zip(_split(ends), weights, strict=True):
        out[group] = x[group] @ weight
    return out


def grouped_outer_product(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Return `x_e^T y_e` for the rows of each group, `[E, D, F]`: x `[N, D]`, y `[N, F]`; 0 for empty groups.

    In the accumulation dtype; results of `grouped_mm` are rounded to the inputs' dtype first.
    """
    dtype = accumulation_dtype(x.dtype)
    if len(ends) == 1:
        return (x.T @ y).to(dtype)[None]
    if len(x) and _aligned(x.shape[1], y.shape[1], dtype=x.dtype):
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=ends).to(dtype)
    out = torch.empty(len(ends), x.shape[1], y.shape[1], dtype=dtype, device=x.device)
    for number, group in enumerate(_split(ends)):
        out[number] = x[group].T @ y[group]
    return out


def _split(ends: Tensor) -> list[slice]:
    """Return the rows of each group."""
    bounds = [0, *ends.tolist()]
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]

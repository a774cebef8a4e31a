"""Products of groups of rows with a matrix each: what experts compute of the tokens that came to them.

Rows are sorted by group, `ends[e]` is the row after the last one of group e. `torch.nn.functional.grouped_mm` takes
float32 and halves whose rows are multiples of 16 bytes; a loop of products takes the rest (float64, odd widths).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype

_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = 16


def _aligned(*widths: int, dtype: torch.dtype) -> bool:
    return dtype in _GROUPED and all(width > 0 and width * dtype.itemsize % _BYTES == 0 for width in widths)


def rows_times(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`x_e W_e` for the rows x_e of each group: x `[N, D]`, weights `[E, D, F]`, ends `[E]` int32: `[N, F]`."""
    if len(weights) == 1:
        return x @ weights[0]
    if len(x) and _aligned(*weights.shape[1:], dtype=x.dtype):
        return F.grouped_mm(x.contiguous(), weights, offs=ends)
    out = x.new_empty(len(x), weights.shape[2])
    for group, weight in zip(_split(ends), weights, strict=True):
        out[group] = x[group] @ weight
    return out


def outer_products(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """`x_e^T y_e` of the rows of each group, 0 where it has none: x `[N, D]`, y `[N, F]`: `[E, D, F]`.

    In the accumulation dtype, rounded to the inputs' on the way where a grouped product makes it.
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
    """The rows of each group."""
    stops = ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *stops], stops, strict=False)]

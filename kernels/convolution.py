"""Short causal convolution per channel (depthwise), as in Mamba-2, Gated DeltaNet and KDA, for packed documents.

    y[t, c] = activation(bias[c] + sum_{i < J} weight[c, i] x[t - (J - 1) + i, c])

The last tap multiplies the token itself (the order of Dao's causal_conv1d). Tokens before the start of a document count
as zeros. The local tokens may be several segments of a sequence; each comes with the J - 1 tokens before it (`before`),
zeros where those belong to another document than the last of them.

On a CPU float32 and bf16 run in C++ (`longctx.kernels.native_convolution`), on CUDA all but float64 in Triton, up to 16
taps (`triton_convolution`). Elsewhere it is J shifted multiply-adds over a tile of tokens: on a CPU one that stays in
cache, 3 to 19 times faster than torch's grouped conv1d on the same tile, which copies channels-last tokens; on CUDA the
whole tensor. Computed in the accumulation dtype and cast once; the backward pass recomputes the activation's input.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels import native_convolution as native
from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.device import import_triton
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.checks import DTYPES
from longctx.kernels.linear.recurrence import Segment
from longctx.kernels.operator import register
from longctx.kernels.pointwise import TILE_ELEMENTS

ACTIVATIONS = (None, "silu")


def _tiles(x: Tensor, length: int) -> tuple[list[slice], list[tuple[int, int]]]:
    """Split the batch, and `length` tokens, of `x [B, T, D]` into ranges; a tile is one range of each."""
    batch, _, width = x.shape
    if x.device.type != "cpu":
        return [slice(0, batch)], [(0, length)] if length else []
    tokens = max(1, min(length, TILE_ELEMENTS // width))
    rows = max(1, TILE_ELEMENTS // (tokens * width))
    batches = [slice(begin, min(begin + rows, batch)) for begin in range(0, batch, rows)]
    return batches, [(begin, min(begin + tokens, length)) for begin in range(0, length, tokens)]


def _masked_rows(starts: Sequence[int], first: int, begin: int, end: int, width: int) -> list[Tensor | None]:
    """Return, per distance s < width, the rows in `[begin, end)` whose token s earlier is in another document.

    `starts` ascending; `first` is the first token of the segment; rows count from `begin`. None if there are none.
    """
    near = starts[bisect_left(starts, max(first, begin - width + 2)) : bisect_left(starts, end)]
    if not near:
        return [None] * width
    # The first s tokens of a document have no token s before them.
    rows = torch.tensor(near, device="cpu")[:, None] - begin + torch.arange(width - 1, device="cpu")
    masked: list[Tensor | None] = [None]
    for distance in range(1, width):
        at_distance = rows[:, :distance].flatten()
        at_distance = at_distance[(at_distance >= 0) & (at_distance < end - begin)]
        masked.append(at_distance if len(at_distance) else None)
    return masked


class _Tile:
    """The shifted, masked inputs of the J taps for one tile."""

    def __init__(self, x: Tensor, before: Tensor, begin: int, end: int, masked: Sequence[Tensor | None]) -> None:
        """Take tokens `[begin, end)` of a segment `x [B, T, D]` preceded by `before [B, J - 1, D]`."""
        dtype, reach = accumulation_dtype(x.dtype), before.shape[1]
        missing = max(0, reach - begin)
        window = x[:, begin - reach + missing : end].to(dtype)
        if missing:
            window = torch.cat([before[:, reach - missing :].to(dtype), window], dim=1)
        self.rows = end - begin
        self.masked = [None if rows is None else rows.to(x.device) for rows in reversed(masked)]
        self.taps = [self.mask(window[:, i : i + self.rows], i) for i in range(reach + 1)]

    def mask(self, x: Tensor, tap: int) -> Tensor:
        """Zero the rows of `x` at which a tap would reach into another document."""
        rows = self.masked[tap]
        return x if rows is None else x.index_fill(1, rows, 0.0)

    def preactivation(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the input of the activation for weight `[J, D]`."""
        out = self.taps[0] * weight[0] if bias is None else torch.addcmul(bias, self.taps[0], weight[0])
        for tap, row in zip(self.taps[1:], weight[1:], strict=True):
            out.addcmul_(tap, row)
        return out


def _by_taps(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return weight by taps, `[J, D]`, and bias, both in the accumulation dtype."""
    return weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _kernels(x: Tensor, weight: Tensor) -> ModuleType | None:
    """Return the module whose kernels take the arguments: C++ on CPUs, Triton on CUDA; None: torch operators."""
    if native.is_supported(x):
        return native
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    kernels = import_triton("longctx.kernels.triton_convolution")
    return kernels if kernels is not None and weight.shape[1] <= kernels.MAX_TAPS else None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> Tensor:
    kernels = _kernels(x, weight)
    if kernels is not None:
        return kernels.forward(x, weight, bias, before, bounds, starts, activation)
    width = weight.shape[1]
    rows, shift = _by_taps(weight, bias, accumulation_dtype(x.dtype))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for number, (first, last) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
        segment, done = x[:, first:last], out[:, first:last]
        batches, tokens = _tiles(x, last - first)
        for begin, end in tokens:
            masked = _masked_rows(starts, first, first + begin, first + end, width)
            for batch in batches:
                y = _Tile(segment[batch], before[number, batch], begin, end, masked).preactivation(rows, shift)
                done[batch, begin:end] = F.silu(y, inplace=True) if activation == "silu" else y
    return out


def _store(grads: Tensor, at: int, dbefore: Tensor, dx: Tensor) -> None:
    """Write gradients of the tokens from index `at` on of (`before`, segment) into `dbefore` and `dx`."""
    inside = min(max(dbefore.shape[1] - at, 0), grads.shape[1])
    dbefore[:, at : at + inside] = grads[:, :inside]
    begin = at + inside - dbefore.shape[1]
    if inside < grads.shape[1]:
        dx[:, begin : begin + grads.shape[1] - inside] = grads[:, inside:]


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels(x, weight)
    if kernels is not None:
        return kernels.backward(dy, x, weight, bias, before, bounds, starts, activation)
    dtype, width = accumulation_dtype(x.dtype), weight.shape[1]
    rows, shift = _by_taps(weight, bias, dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbefore = torch.empty_like(before, memory_format=torch.contiguous_format)
    drows = torch.zeros_like(rows)
    dshift = x.new_zeros(0 if bias is None else x.shape[2], dtype=dtype)
    for number, (first, last) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
        batches, tokens = _tiles(x, last - first)
        for batch in batches:
            segment, dsegment, grads = x[batch, first:last], dx[batch, first:last], dy[batch, first:last]
            # The last J - 1 tokens of a tile also get gradients from the next tile, so they are stored with it.
            pending = torch.zeros(segment.shape[0], width - 1, x.shape[2], dtype=dtype, device=x.device)
            for begin, end in tokens:
                masked = _masked_rows(starts, first, first + begin, first + end, width)
                tile = _Tile(segment, before[number, batch], begin, end, masked)
                grad = grads[:, begin:end].to(dtype)
                if activation == "silu":
                    grad = torch.ops.aten.silu_backward(grad, tile.preactivation(rows, shift))
                dwindow = torch.cat([pending, torch.zeros_like(grad)], dim=1)
                for i, tap in enumerate(tile.taps):
                    tap_grad = tile.mask(grad, i)
                    dwindow[:, i : i + tile.rows].addcmul_(tap_grad, rows[i])
                    drows[i] += (tap_grad * tap).sum(dim=(0, 1))
                if bias is not None:
                    dshift += grad.sum(dim=(0, 1))
                _store(dwindow[:, : tile.rows], begin, dbefore[number, batch], dsegment)
                pending = dwindow[:, tile.rows :]
            _store(pending, last - first, dbefore[number, batch], dsegment)
    return dx, drows.t().to(weight.dtype).contiguous(), dshift.to((weight if bias is None else bias).dtype), dbefore


def _fake_forward(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, before.new_empty(before.shape)


def _flops(x: Any, weight: Any, *arguments: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * batch * length * channels * weight[1]


def _grad_flops(dy: Any, x: Any, weight: Any, *arguments: Any, **kwargs: Any) -> int:
    return 2 * _flops(x, weight)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor before, int[] bounds, int[] starts, str? activation"
_convolution = register("causal_convolution", f"({_ARGUMENTS}) -> Tensor", _forward, _fake_forward, _flops)
_convolution_grad = register(
    "causal_convolution_grad",
    f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _grad_flops,
)


def _encode(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Encode segments as (begin and end of each, document starts in all of them, ascending)."""
    bounds = [n for s in segments for n in (s.begin, s.end)]
    return bounds, sorted([s.begin + start for s in segments for start in s.starts])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    segments: Sequence[Segment],
    activation: str | None,
) -> Tensor:
    """Compute y `[B, T, D]` in x's dtype; arguments as in `causal_convolution`, unchecked."""
    return _convolution(x, weight, bias, before, *_encode(segments), activation)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    segments: Sequence[Segment],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Compute dx, dweight, dbias (None without bias) and dbefore, each in the dtype of its tensor."""
    dx, dweight, dbias, dbefore = _convolution_grad(dy, x, weight, bias, before, *_encode(segments), activation)
    return dx, dweight, None if bias is None else dbias, dbefore


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        before: Tensor,
        segments: tuple[Segment, ...],
        activation: str | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, before)
        ctx.segments, ctx.activation = segments, activation
        return forward(x, weight, bias, before, segments, activation)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        return *backward(grads[0], x, weight, bias, before, ctx.segments, ctx.activation), None, None


def _check_shape(name: str, tensor: Tensor, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise ValueError if a tensor does not have a shape, or is on another device than x."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {meaning} = {list(shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}: expected the same device")


def _check_tokens(name: str, tensor: Tensor, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    _check_shape(name, tensor, x, shape, meaning)
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, but x is {x.dtype}: expected the same dtype")


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dims: str) -> None:
    """Raise ValueError, naming the argument, if x does not have the dims `dims` (channels last), or weight `[D, J]`,
    bias `[D]` or activation do not fit."""
    if x.dim() != dims.count(",") + 1:
        raise ValueError(f"x has shape {list(x.shape)}: expected {dims}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: expected one of {', '.join(str(d) for d in DTYPES)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}: expected at least one channel")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected [channels, taps] with at least one tap")
    _check_shape("weight", weight, x, (x.shape[-1], weight.shape[1]), "[channels, taps]")
    if bias is not None:
        _check_shape("bias", bias, x, x.shape[-1:], "[channels]")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in DTYPES:
            raise ValueError(f"{name} is {parameter.dtype}: expected one of {', '.join(str(d) for d in DTYPES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected None or 'silu'")


def check_before(name: str, before: Tensor, x: Tensor, count: int) -> None:
    """Raise ValueError if a tensor is not `[B, count, D]` of x's dtype."""
    _check_tokens(name, before, x, (x.shape[0], count, x.shape[-1]), "[batch, taps - 1, channels]")


def _check_segments(segments: Sequence[Segment], length: int) -> None:
    reached = 0
    for begin, end in sorted([(s.begin, s.end) for s in segments]):
        if begin != reached or end < begin:
            raise ValueError(
                f"segments have tokens {begin} to {end} after the first {reached}: expected neither overlaps nor gaps"
            )
        reached = end
    if reached != length:
        raise ValueError(f"segments have {reached} tokens: expected the {length} of x")
    for segment in segments:
        if any(left >= right for left, right in pairwise((-1, *segment.starts, segment.size))):
            raise ValueError(
                f"segments have starts {list(segment.starts[:8])}: expected ascending offsets below {segment.size}"
            )


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    segments: Sequence[Segment] | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Compute the short causal convolution of the local tokens, `[B, T, D]` in x's dtype.

    Shapes: x `[B, T, D]`; weight `[D, J]`, its last column for the token itself; bias `[D]`; activation None or "silu".
    `segments` cover the tokens, in any order; by default one segment without document starts. A document that starts in
    a segment sees no token before its start. before `[N, B, J - 1, D]` in x's dtype has the tokens that precede each
    segment in the sequence if they belong to the document that the segment continues, else zeros (`final_window`);
    zeros by default. weight and bias may have another dtype than x. Differentiable in every tensor.

    Raises ValueError, naming the argument, if one does not fit.
    """
    check_arguments(x, weight, bias, activation, "[batch, tokens, channels]")
    batch, length, channels = x.shape
    segments = (Segment(0, length),) if segments is None else tuple(segments)
    _check_segments(segments, length)
    shape = (len(segments), batch, weight.shape[1] - 1, channels)
    if before is None:
        before = x.new_zeros(shape)
    _check_tokens("before", before, x, shape, "[segments, batch, taps - 1, channels]")
    return _CausalConvolution.apply(x, weight, bias, before, segments, activation)  # type: ignore[no-untyped-call]


def final_window(x: Tensor, count: int, *, starts: Sequence[int] = (), before: Tensor | None = None) -> Tensor:
    """Return the convolution window after a sequence: its last `count` (J - 1) tokens, `[B, count, D]`.

    Zeros where the last document has fewer tokens. It is the `window` of `step` and the `before` of the next segment.
    Shapes: x `[B, T, D]`; before `[B, count, D]`, the tokens that precede x, zeros by default; starts: offsets of
    document starts, ascending. Differentiable by autograd.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: expected [batch, tokens, channels]")
    if count < 0:
        raise ValueError(f"count is {count}: expected at least 0 tokens")
    _check_segments((Segment(0, x.shape[1], tuple(starts)),), x.shape[1])
    if before is None:
        before = x.new_zeros(x.shape[0], count, x.shape[2])
    check_before("before", before, x, count)
    tail = x[:, max(x.shape[1] - count, starts[-1] if starts else 0) :]
    missing = count - tail.shape[1]
    earlier = torch.zeros_like(before[:, :missing]) if starts else before[:, count - missing :]
    return torch.cat([earlier, tail], dim=1)


def step(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """Decode one token: return y `[B, D]` and the new window, given the window `[B, J - 1, D]` of the tokens before it.

    Shapes: x `[B, D]`, weight `[D, J]`, bias `[D]`. Same equation as `causal_convolution`, in the accumulation dtype
    and cast once; differentiable by autograd.
    """
    check_arguments(x, weight, bias, activation, "[batch, channels]")
    check_before("window", window, x, weight.shape[1] - 1)
    tokens = torch.cat([window, x[:, None]], dim=1)
    rows, shift = _by_taps(weight, bias, accumulation_dtype(x.dtype))
    y = (tokens * rows).sum(dim=1)
    y = y if shift is None else y + shift
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), tokens[:, 1:]

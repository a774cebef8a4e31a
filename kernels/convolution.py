"""The short causal convolution of each channel, as in Mamba-2, Gated DeltaNet and KDA, with documents reset.

    y[t, c] = activation(bias[c] + sum_{i < W} weight[c, i] x[t - (W - 1) + i, c])

The last tap multiplies the token itself (Dao's causal_conv1d has the same order). Tokens before the start of a
document count as zeros. The tokens at hand may be several segments of a sequence; each is given the W - 1 tokens that
precede it, with zeros for those of another document than the last of them.

W shifted multiply-adds over a tile of tokens that stays in cache: on a CPU that is 3 to 19 times faster than torch's
grouped conv1d on the same tile, which lays channels-last tokens out anew. On other devices a tile is everything.
Computed in the accumulation dtype and cast once; the backward pass makes what the activation took again.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.checks import DTYPES
from longctx.kernels.linear.recurrence import Segment
from longctx.kernels.pointwise import TILE_ELEMENTS

ACTIVATIONS = (None, "silu")


def _tiles(x: Tensor, length: int) -> tuple[list[slice], list[tuple[int, int]]]:
    """Ranges of the batch, and of `length` tokens of `x [B, T, D]`: a tile is one of each."""
    batch, _, width = x.shape
    if x.device.type != "cpu":
        return [slice(0, batch)], [(0, length)] if length else []
    tokens = max(1, min(length, TILE_ELEMENTS // width))
    rows = max(1, TILE_ELEMENTS // (tokens * width))
    batches = [slice(begin, min(begin + rows, batch)) for begin in range(0, batch, rows)]
    return batches, [(begin, min(begin + tokens, length)) for begin in range(0, length, tokens)]


def _hidden(starts: Sequence[int], first: int, begin: int, end: int, width: int) -> list[Tensor | None]:
    """For each distance s < width, the rows of tokens `begin` to `end` whose token s earlier is of another document.

    `starts` ascending, `first` the first token of the segment; rows count from `begin`. None where there is none.
    """
    near = starts[bisect_left(starts, max(first, begin - width + 2)) : bisect_left(starts, end)]
    if not near:
        return [None] * width
    # From a start on, s tokens do not see what is s before them.
    rows = torch.tensor(near, device="cpu")[:, None] - begin + torch.arange(width - 1, device="cpu")
    hidden: list[Tensor | None] = [None]
    for distance in range(1, width):
        reached = rows[:, :distance].flatten()
        reached = reached[(reached >= 0) & (reached < end - begin)]
        hidden.append(reached if len(reached) else None)
    return hidden


class _Tile:
    """What the W taps multiply in one tile, and what they multiply it by."""

    def __init__(self, x: Tensor, before: Tensor, begin: int, end: int, hidden: Sequence[Tensor | None]) -> None:
        """Tokens `begin` to `end` of a segment `x [B, T, D]` that `before [B, W - 1, D]` precedes."""
        dtype, reach = accumulation_dtype(x.dtype), before.shape[1]
        missing = max(0, reach - begin)
        window = x[:, begin - reach + missing : end].to(dtype)
        if missing:
            window = torch.cat([before[:, reach - missing :].to(dtype), window], dim=1)
        self.rows = end - begin
        self.hidden = [None if rows is None else rows.to(x.device) for rows in reversed(hidden)]
        self.taps = [self.visible(window[:, i : i + self.rows], i) for i in range(reach + 1)]

    def visible(self, part: Tensor, tap: int) -> Tensor:
        """`part`, with zeros where a tap would reach into another document."""
        rows = self.hidden[tap]
        return part if rows is None else part.index_fill(1, rows, 0.0)

    def summed(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What goes into the activation, for weight `[W, D]`."""
        out = self.taps[0] * weight[0] if bias is None else torch.addcmul(bias, self.taps[0], weight[0])
        for tap, row in zip(self.taps[1:], weight[1:], strict=True):
            out.addcmul_(tap, row)
        return out


def _wide(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """weight by taps, `[W, D]`, and bias, in the accumulation dtype."""
    return weight.t().to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> Tensor:
    width = weight.shape[1]
    rows, shift = _wide(weight, bias, accumulation_dtype(x.dtype))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for number, (first, last) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
        segment, done = x[:, first:last], out[:, first:last]
        batches, tokens = _tiles(x, last - first)
        for begin, end in tokens:
            hidden = _hidden(starts, first, first + begin, first + end, width)
            for batch in batches:
                summed = _Tile(segment[batch], before[number, batch], begin, end, hidden).summed(rows, shift)
                done[batch, begin:end] = F.silu(summed, inplace=True) if activation == "silu" else summed
    return out


def _store(line: Tensor, at: int, dbefore: Tensor, dx: Tensor) -> None:
    """Write `line`, the gradients from place `at` on of W - 1 tokens `before` and those of the segment behind them."""
    inside = min(max(dbefore.shape[1] - at, 0), line.shape[1])
    dbefore[:, at : at + inside] = line[:, :inside]
    begin = at + inside - dbefore.shape[1]
    if inside < line.shape[1]:
        dx[:, begin : begin + line.shape[1] - inside] = line[:, inside:]


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
    dtype, width = accumulation_dtype(x.dtype), weight.shape[1]
    rows, shift = _wide(weight, bias, dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbefore = torch.empty_like(before, memory_format=torch.contiguous_format)
    drows = torch.zeros_like(rows)
    dshift = x.new_zeros(0 if bias is None else x.shape[2], dtype=dtype)
    for number, (first, last) in enumerate(zip(bounds[::2], bounds[1::2], strict=True)):
        batches, tokens = _tiles(x, last - first)
        for batch in batches:
            segment, dsegment, grads = x[batch, first:last], dx[batch, first:last], dy[batch, first:last]
            # The last W - 1 tokens of a tile have gradients from the next one too: they wait for it.
            waiting = torch.zeros(segment.shape[0], width - 1, x.shape[2], dtype=dtype, device=x.device)
            for begin, end in tokens:
                hidden = _hidden(starts, first, first + begin, first + end, width)
                tile = _Tile(segment, before[number, batch], begin, end, hidden)
                grad = grads[:, begin:end].to(dtype)
                if activation == "silu":
                    grad = torch.ops.aten.silu_backward(grad, tile.summed(rows, shift))
                line = torch.cat([waiting, torch.zeros_like(grad)], dim=1)
                for i, tap in enumerate(tile.taps):
                    reached = tile.visible(grad, i)
                    line[:, i : i + tile.rows].addcmul_(reached, rows[i])
                    drows[i] += (reached * tap).sum(dim=(0, 1))
                if bias is not None:
                    dshift += grad.sum(dim=(0, 1))
                _store(line[:, : tile.rows], begin, dbefore[number, batch], dsegment)
                waiting = line[:, tile.rows :]
            _store(waiting, last - first, dbefore[number, batch], dsegment)
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


def _register(name: str, signature: str, function: Any, fake: Any, flops: Any) -> Any:
    """The operator `longctx::name`: torch.compile takes it whole, FlopCounterMode counts it."""
    torch.library.define(f"longctx::{name}", signature)
    torch.library.impl(f"longctx::{name}", "CompositeExplicitAutograd")(function)
    torch.library.register_fake(f"longctx::{name}")(fake)
    packet = getattr(torch.ops.longctx, name)
    register_flop_formula(packet)(flops)
    return packet.default


_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor before, int[] bounds, int[] starts, str? activation"
_convolution = _register("causal_convolution", f"({_ARGUMENTS}) -> Tensor", _forward, _fake_forward, _flops)
_convolution_grad = _register(
    "causal_convolution_grad",
    f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _grad_flops,
)


def _encode(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """Begin and end of each segment, and where documents begin in all of them, ascending."""
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
    """y `[B, T, D]` in x's dtype; arguments as in `causal_convolution`, not checked."""
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
    """dx, dweight, dbias (None without bias) and dbefore, each in the dtype of what it is the gradient of."""
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


def _like(name: str, tensor: Tensor, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise ValueError where a tensor that holds tokens or parameters does not fit x."""
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {meaning} = {list(shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}: expected the same device")


def _check_tokens(name: str, tensor: Tensor, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    _like(name, tensor, x, shape, meaning)
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} is {tensor.dtype}, but x is {x.dtype}: expected the same dtype")


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, dims: str) -> None:
    """Raise ValueError, naming the argument, where x does not have the dimensions `dims`, the last of them channels.

    Or where weight `[D, W]`, bias `[D]` or activation do not fit.
    """
    if x.dim() != dims.count(",") + 1:
        raise ValueError(f"x has shape {list(x.shape)}: expected {dims}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: expected one of {', '.join(str(d) for d in DTYPES)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}: expected at least one channel")
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected [channels, taps] with at least one tap")
    _like("weight", weight, x, (x.shape[-1], weight.shape[1]), "[channels, taps]")
    if bias is not None:
        _like("bias", bias, x, x.shape[-1:], "[channels]")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in DTYPES:
            raise ValueError(f"{name} is {parameter.dtype}: expected one of {', '.join(str(d) for d in DTYPES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: expected None or 'silu'")


def check_before(name: str, before: Tensor, x: Tensor, count: int) -> None:
    """Raise ValueError where a tensor is not `count` tokens `[B, count, D]` of x's dtype."""
    _check_tokens(name, before, x, (x.shape[0], count, x.shape[-1]), "[batch, taps - 1, channels]")


def _check_segments(segments: Sequence[Segment], length: int) -> None:
    reached = 0
    for begin, end in sorted([(s.begin, s.end) for s in segments]):
        if begin != reached or end < begin:
            raise ValueError(
                f"segments has tokens {begin} to {end} after {reached} tokens: expected segments that do not overlap "
                "and leave no token out"
            )
        reached = end
    if reached != length:
        raise ValueError(f"segments has {reached} tokens: expected the {length} of x")
    for segment in segments:
        if any(left >= right for left, right in pairwise((-1, *segment.starts, segment.size))):
            raise ValueError(
                f"segments has starts {list(segment.starts[:8])}: expected ascending places in {segment.size} tokens"
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
    """The short causal convolution over the tokens at hand, `[B, T, D]` in x's dtype.

    Shapes: x `[B, T, D]`; weight `[D, W]`, its last column for the token itself; bias `[D]`; activation None or "silu".
    `segments` (one, without a start, by default) cover the tokens, in any order; a document begins at each of their
    starts and sees no token before it. before `[N, B, W - 1, D]` in x's dtype holds what precedes each segment in the
    sequence, as far as it is of the document that the segment goes on with, and zeros before that (`final_window`);
    zeros by default. weight and bias may have another dtype than x. Differentiable in every tensor.

    Raises ValueError where an argument does not fit, naming it.
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
    """The last `count` (W - 1) tokens of a sequence, as the next token of its last document sees them.

    Shapes: x `[B, T, D]`, before `[B, count, D]`, the tokens that precede x, zeros by default. starts ascending, the
    places at which documents begin. Returns `[B, count, D]`, zeros where the document or the sequence has fewer
    tokens: the window that `step` takes, and `before` of what follows. Differentiable by autograd.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: expected [batch, tokens, channels]")
    if count < 0:
        raise ValueError(f"count is {count}: expected a number of tokens")
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
    """One token of generation: y `[B, D]` and the new window, for the window `[B, W - 1, D]` of the tokens before it.

    Shapes: x `[B, D]`, weight `[D, W]`, bias `[D]`. The same equation as `causal_convolution`, computed in the
    accumulation dtype and cast once; differentiable by autograd.
    """
    check_arguments(x, weight, bias, activation, "[batch, channels]")
    check_before("window", window, x, weight.shape[1] - 1)
    tokens = torch.cat([window, x[:, None]], dim=1)
    rows, shift = _wide(weight, bias, accumulation_dtype(x.dtype))
    y = (tokens * rows).sum(dim=1)
    y = y if shift is None else y + shift
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), tokens[:, 1:]

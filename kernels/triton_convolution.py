"""Short causal convolution in Triton, on CUDA: one kernel forward, one backward; each reads and writes a token once.

The equations of `longctx.kernels.convolution`. With dist = J - 1 - i the distance of tap i, a token reads the tokens up
to `reach` before it, those of its document (`token_reach`), from x or from the J - 1 tokens before its segment:

    a_t = bias + sum_{dist <= reach_t} weight[J - 1 - dist] x_{t - dist}        y_t = activation(a_t)
    da_t = dy_t activation'(a_t)        dx_t = sum_{dist <= reach_{t + dist}} weight[J - 1 - dist] da_{t + dist}

Backward, a program computes da of the J - 1 tokens after its own again, from what is in cache. Bytes per element with e
bytes each: 2e forward, 3e backward, and 4 (J + 1) / BLOCK_T for the sums of dweight and dbias. Sums are float32. The
first block of each segment is a launch of its own, since it alone reads the tokens before the segment.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longctx.kernels.device import DeviceCopy, launch_device

MAX_TAPS = 16
BLOCK_T, BLOCK_D = 32, 64
"""Tokens and channels of a program of 4 warps, the largest without a stack: up to 183 registers with 4 taps on sm_90,
from where on a program has half as many tokens."""


@lru_cache(maxsize=8)
def _reach_copy(bounds: tuple[int, ...], starts: tuple[int, ...], taps: int, device: torch.device) -> DeviceCopy:
    return DeviceCopy(token_reach(bounds, starts, taps), device)


@lru_cache(maxsize=64)
def _bounds_copy(bounds: tuple[int, ...], device: torch.device) -> DeviceCopy:
    return DeviceCopy(torch.tensor(bounds, dtype=torch.int32), device)


def token_reach(bounds: Sequence[int], starts: Sequence[int], taps: int) -> Tensor:
    """Return how many tokens before it each token reads, `[T]` int8: those of its document, at most `taps - 1`.

    `bounds` are begin and end of each segment, `starts` the first tokens of documents, ascending. Tokens before the
    first start in a segment read on into the tokens before the segment.
    """
    length = max(bounds, default=0)
    reach = torch.full((length,), taps - 1, dtype=torch.int8)
    if starts:
        first = torch.tensor(starts)
        limits = torch.tensor(sorted({*starts, *bounds[1::2]}))
        ends = limits[torch.searchsorted(limits, first, right=True)]
        for distance in range(taps - 1):
            at = first + distance
            reach[at[at < ends]] = distance
    return reach


@triton.jit
def _load_tokens(x_at, x_stride, before_at, before_stride, source, size, columns, in_row, J: tl.constexpr):
    """Load tokens at `source` in a segment, float32: 0 outside of it, or those before it where `before_at` is not None.

    Masked by nothing else, so that the compiler loads each token once for all taps and programs' rows that read it.
    """
    at = x_at + source[:, None] * x_stride + columns[None, :]
    tokens = tl.load(at, mask=((source >= 0) & (source < size))[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    if before_at is not None:
        place = J - 1 + source
        rows = before_at + place[:, None] * before_stride + columns[None, :]
        earlier = tl.load(rows, mask=((place >= 0) & (source < 0))[:, None] & in_row[None, :], other=0.0)
        tokens += earlier.to(tl.float32)
    return tokens


@triton.jit
def _load_reach(reach, begin, offset, size):
    """Load the reach of the tokens at `offset` in a segment; -1 outside of it."""
    return tl.load(reach + begin + offset, mask=(offset >= 0) & (offset < size), other=-1).to(tl.int32)


@triton.jit
def _preactivation(
    x_at, x_stride, before_at, before_stride, weight, bias, offset, reach, size, columns, in_row, D, J: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute a of the tokens at `offset`, `[ROWS, BLOCK_D]`; meaningless where the reach is -1."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)[None, :]
    for dist in tl.static_range(J):
        tokens = _load_tokens(x_at, x_stride, before_at, before_stride, offset - dist, size, columns, in_row, J)
        row = tl.load(weight + (J - 1 - dist) * D + columns, mask=in_row, other=0.0)
        total += tl.where((dist <= reach)[:, None], tokens, 0.0) * row[None, :]
    return total


@triton.jit
def _preactivation_grad(
    dy_at, dy_stride, x_at, x_stride, before_at, before_stride, weight, bias, offset, reach, size, columns, in_row, D,
    J: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute da of the tokens at `offset`, 0 where the reach is -1."""
    mask = (reach >= 0)[:, None] & in_row[None, :]
    grad = tl.load(dy_at + offset[:, None] * dy_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if SILU:
        a = _preactivation(
            x_at, x_stride, before_at, before_stride, weight, bias, offset, reach, size, columns, in_row, D, J, ROWS,
            BLOCK_D,
        )  # fmt: skip
        sigmoid = 1 / (1 + tl.exp(-a))
        grad *= sigmoid * (1 + a * (1 - sigmoid))
    return grad


@triton.jit
def _later_grads(
    dy_at, dy_stride, x_at, x_stride, before_at, before_stride, weight, bias, reach, begin, offset, size, columns,
    in_row, D, J: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum what the J - 1 tokens after those at `offset` add to their gradient, `[ROWS, BLOCK_D]`."""
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for dist in tl.static_range(1, J):
        later_reach = _load_reach(reach, begin, offset + dist, size)
        grad = _preactivation_grad(
            dy_at, dy_stride, x_at, x_stride, before_at, before_stride, weight, bias, offset + dist, later_reach, size,
            columns, in_row, D, J, SILU, ROWS, BLOCK_D,
        )  # fmt: skip
        row = tl.load(weight + (J - 1 - dist) * D + columns, mask=in_row, other=0.0)
        total += tl.where((later_reach >= dist)[:, None], grad, 0.0) * row[None, :]
    return total


@triton.jit
def _locate(bounds, blocks, FIRST: tl.constexpr):
    """Return this program's segment, block and batch row, and the segment's first token and size.

    With FIRST the first block of each segment, which reads the tokens before it; else one of the `blocks` others.
    """
    program = tl.program_id(0)
    segment = program if FIRST else program // blocks
    block = 0 if FIRST else 1 + program % blocks
    begin = tl.load(bounds + 2 * segment)
    return segment, block, tl.program_id(2).to(tl.int64), begin, tl.load(bounds + 2 * segment + 1) - begin


@triton.jit
def _at_segment(x, strides, row, begin):
    """Return the pointer to a segment's first token in `x [B, T, D]`, given the strides of B and T."""
    return x + row * strides[0] + begin.to(tl.int64) * strides[1]


@triton.jit
def forward_kernel(
    x, x_strides, before, before_strides, weight, bias, reach, bounds, out, out_strides, blocks, D,
    FIRST: tl.constexpr, J: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y of a block of tokens of a segment. Strides are of segments (of `before`), batch rows and tokens."""
    segment, block, row, begin, size = _locate(bounds, blocks, FIRST)
    if block * BLOCK_T >= size:
        return
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < D
    offset = block * BLOCK_T + tl.arange(0, BLOCK_T)
    before_at = before + segment.to(tl.int64) * before_strides[0] + row * before_strides[1] if FIRST else None
    y = _preactivation(
        _at_segment(x, x_strides, row, begin), x_strides[1], before_at, before_strides[2], weight, bias, offset,
        _load_reach(reach, begin, offset, size), size, columns, in_row, D, J, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if SILU:
        y = y / (1 + tl.exp(-y))
    out_at = _at_segment(out, out_strides, row, begin) + offset[:, None] * out_strides[1] + columns[None, :]
    tl.store(out_at, y.to(out.dtype.element_ty), mask=(offset < size)[:, None] & in_row[None, :])


@triton.jit
def backward_kernel(
    dy, dy_strides, x, x_strides, before, before_strides, weight, bias, reach, bounds,
    dx, dx_strides, dbefore, dbefore_strides, sums, blocks, D,
    FIRST: tl.constexpr, J: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SUMS: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """Compute dx of a block of tokens of a segment, and its summands of dweight and dbias in `sums [P, J + 1, D]`.

    The first block of a segment computes dbefore too. P counts batch rows and programs of a batch row; SUMS and EARLIER
    are J + 1 and J - 1, rounded up to powers of two.
    """
    segment, block, row, begin, size = _locate(bounds, blocks, FIRST)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < D
    offset = block * BLOCK_T + tl.arange(0, BLOCK_T)
    x_at, dy_at = _at_segment(x, x_strides, row, begin), _at_segment(dy, dy_strides, row, begin)
    before_at = before + segment.to(tl.int64) * before_strides[0] + row * before_strides[1] if FIRST else None
    token_reach = _load_reach(reach, begin, offset, size)
    grad = _preactivation_grad(
        dy_at, dy_strides[1], x_at, x_strides[1], before_at, before_strides[2], weight, bias, offset, token_reach, size,
        columns, in_row, D, J, SILU, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    sum_rows = tl.arange(0, SUMS)
    total = tl.where((sum_rows == J)[:, None], tl.sum(grad, 0)[None, :], 0.0)
    for dist in tl.static_range(J):
        tokens = _load_tokens(x_at, x_strides[1], before_at, before_strides[2], offset - dist, size, columns, in_row, J)
        products = tl.where((dist <= token_reach)[:, None], grad * tokens, 0.0)
        total = tl.where((sum_rows == J - 1 - dist)[:, None], tl.sum(products, 0)[None, :], total)
    grad *= tl.load(weight + (J - 1) * D + columns, mask=in_row, other=0.0)[None, :]
    grad += _later_grads(
        dy_at, dy_strides[1], x_at, x_strides[1], before_at, before_strides[2], weight, bias, reach, begin, offset,
        size, columns, in_row, D, J, SILU, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    dx_at = _at_segment(dx, dx_strides, row, begin) + offset[:, None] * dx_strides[1] + columns[None, :]
    tl.store(dx_at, grad.to(dx.dtype.element_ty), mask=(offset < size)[:, None] & in_row[None, :])
    sums_at = sums + (row * tl.num_programs(0) + tl.program_id(0)) * (J + 1) * D
    tl.store(sums_at + sum_rows[:, None] * D + columns[None, :], total, mask=(sum_rows <= J)[:, None] & in_row[None, :])
    if FIRST:
        earlier = tl.arange(0, EARLIER) - EARLIER
        earlier_grad = _later_grads(
            dy_at, dy_strides[1], x_at, x_strides[1], before_at, before_strides[2], weight, bias, reach, begin, earlier,
            size, columns, in_row, D, J, SILU, EARLIER, BLOCK_D,
        )  # fmt: skip
        place = J - 1 + earlier
        dbefore_at = dbefore + segment.to(tl.int64) * dbefore_strides[0] + row * dbefore_strides[1]
        dbefore_at += place[:, None] * dbefore_strides[2] + columns[None, :]
        tl.store(dbefore_at, earlier_grad.to(dbefore.dtype.element_ty), mask=(place >= 0)[:, None] & in_row[None, :])


class _Launch:
    """Grids, bounds, reach and constants that the launches of a call share: first blocks of segments, and the others.

    The first block of a segment reads the tokens before it; the others compute nothing for them.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bounds: Sequence[int], starts: Sequence[int], activation: str | None
    ) -> None:
        batch, _, channels = x.shape
        longest = max((end - begin for begin, end in zip(bounds[::2], bounds[1::2], strict=True)), default=0)
        block = BLOCK_T if weight.shape[1] <= 4 else BLOCK_T // 2
        assert weight.shape[1] <= block + 1, "only the first block reads the tokens before a segment"
        self.segments, self.others = len(bounds) // 2, max(0, triton.cdiv(longest, block) - 1)
        self.grid = triton.cdiv(channels, BLOCK_D), batch
        self.bounds = _bounds_copy(tuple(bounds), x.device).tensor()
        self.reach = _reach_copy(tuple(bounds), tuple(starts), weight.shape[1], x.device).tensor()
        self.weight = weight.t().float().contiguous()
        self.device, self.channels = x.device, channels
        self.constants = {
            "J": weight.shape[1], "SILU": activation == "silu", "BLOCK_T": block, "BLOCK_D": BLOCK_D,
        }  # fmt: skip

    @property
    def programs(self) -> tuple[int, int]:
        """Programs per block of channels and batch row: first blocks, others."""
        return self.segments, self.segments * self.others

    def run(self, kernel: Any, first: bool, *arguments: Any, **constants: Any) -> None:
        """Launch the first blocks, or the others; nothing for none."""
        grid = (self.programs[0 if first else 1], *self.grid)
        if all(grid):
            with launch_device(self.device):
                kernel[grid](*arguments, max(1, self.others), self.channels, FIRST=first, **self.constants, **constants)


def _with_channels(x: Tensor) -> Tensor:
    """Return x with contiguous channels, copied if need be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Compute y `[B, T, D]` in x's dtype (float32, bf16, fp16); arguments as in `longctx.kernels.convolution`.

    `weight` `[D, J]`, J at most MAX_TAPS; `bounds` are begin and end of each segment, `starts` the first tokens of
    documents, ascending.
    """
    x, before = _with_channels(x), _with_channels(before)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch = _Launch(x, weight, bounds, starts, activation)
    for first in (True, False):
        launch.run(
            forward_kernel, first,
            x, x.stride()[:2], before, before.stride()[:3], launch.weight, bias, launch.reach, launch.bounds,
            out, out.stride()[:2],
        )  # fmt: skip
    return out


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias (empty without bias) and dbefore; arguments as in `forward`, dy `[B, T, D]`."""
    dy, x, before = _with_channels(dy), _with_channels(x), _with_channels(before)
    channels, taps = weight.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbefore = torch.empty_like(before, memory_format=torch.contiguous_format)
    launch = _Launch(x, weight, bounds, starts, activation)
    total = torch.zeros(taps + 1, channels, dtype=torch.float32, device=x.device)
    for first, programs in zip((True, False), launch.programs, strict=True):
        sums = total.new_empty(x.shape[0] * programs, taps + 1, channels)
        launch.run(
            backward_kernel, first,
            dy, dy.stride()[:2], x, x.stride()[:2], before, before.stride()[:3], launch.weight, bias, launch.reach,
            launch.bounds, dx, dx.stride()[:2], dbefore, dbefore.stride()[:3], sums,
            SUMS=triton.next_power_of_2(taps + 1), EARLIER=max(1, triton.next_power_of_2(taps - 1)),
        )  # fmt: skip
        total += sums.sum(dim=0)
    dweight = total[:taps].t().to(weight.dtype).contiguous()
    dbias = weight.new_empty(0) if bias is None else total[taps].to(bias.dtype)
    return dx, dweight, dbias, dbefore

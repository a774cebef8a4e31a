"""Short causal convolution in Triton, on CUDA: one kernel forward, one backward; each reads and writes a token once.

The equations of `longctx.kernels.convolution`. With dist = J - 1 - i the distance of tap i, a token reads the tokens up
to `reach` before it, those of its document (`token_reach`), from x or from the J - 1 tokens before its segment:

    a_t = bias + sum_{dist <= reach_t} weight[J - 1 - dist] x_{t - dist}        y_t = activation(a_t)
    da_t = dy_t activation'(a_t)        dx_t = sum_{dist <= reach_{t + dist}} weight[J - 1 - dist] da_{t + dist}

Backward, a program goes from token to token with the sums of dweight and dbias in registers, and computes da of the
J - 1 tokens after its own again. Bytes per element with e bytes each: 2e forward, 3e backward, and 4 (J + 1) /
BACKWARD_T for the sums. Sums are float32. Forward, the first block of each segment is a launch of its own, since it
alone reads the tokens before the segment.
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
from where on a program has half as many tokens. Forward."""
BACKWARD_T, BACKWARD_D, AHEAD = 128, 512, 4
"""The same, backward, with 128 channels a warp, half as many from 5 taps on; tokens that are loaded at a time."""


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
    at = x_at + source[:, None].to(tl.int64) * x_stride + columns[None, :]
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
def _zeros(N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return N rows of zeros."""
    rows = ()
    for _ in tl.static_range(N):
        rows = rows + (tl.zeros([BLOCK_D], tl.float32),)
    return rows


@triton.jit
def _load_row(x_at, x_stride, token, size, columns, in_row):
    """Load a token of a segment, float32: 0 outside of it."""
    mask = in_row & (token >= 0) & (token < size)
    return tl.load(x_at + token.to(tl.int64) * x_stride + columns, mask=mask, other=0.0).to(tl.float32)


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
    rows = offset[:, None].to(tl.int64) * out_strides[1]
    out_at = _at_segment(out, out_strides, row, begin) + rows + columns[None, :]
    tl.store(out_at, y.to(out.dtype.element_ty), mask=(offset < size)[:, None] & in_row[None, :])


@triton.jit
def backward_kernel(
    dy, dy_strides, x, x_strides, before, before_strides, weight, bias, reach, bounds,
    dx, dx_strides, dbefore, dbefore_strides, sums, blocks, D,
    J: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute dx of a block of tokens of a segment, and its summands of dweight and dbias in `sums [P, J + 1, D]`.

    Token after token, with the last J tokens, the sums, and the unfinished gradients of the last J - 1 tokens in
    registers: each token of x and dy is read once, but for the J - 1 at either end of a block. Tokens are loaded AHEAD
    at a time. The first block of a segment computes dbefore too. P counts batch rows and programs of a batch row.
    """
    segment, block, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(2).to(tl.int64)
    begin = tl.load(bounds + 2 * segment)
    size = tl.load(bounds + 2 * segment + 1) - begin
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = columns < D
    first = block * BLOCK_T
    last = tl.minimum(first + BLOCK_T, size)
    x_at, dy_at = _at_segment(x, x_strides, row, begin), _at_segment(dy, dy_strides, row, begin)
    dx_at = _at_segment(dx, dx_strides, row, begin)
    before_at = before + segment.to(tl.int64) * before_strides[0] + row * before_strides[1] + columns
    dbefore_at = dbefore + segment.to(tl.int64) * dbefore_strides[0] + row * dbefore_strides[1] + columns
    # By distance: the last tap multiplies the token itself.
    taps, window = (), ()
    for distance in tl.static_range(J):
        taps = taps + (tl.load(weight + (J - 1 - distance) * D + columns, mask=in_row, other=0.0),)
        if distance > 0:
            token = _load_row(x_at, x_strides[1], first - distance, size, columns, in_row)
            place = before_at + (J - 1 - distance) * before_strides[2]
            token += tl.load(place, mask=in_row & (block == 0), other=0.0).to(tl.float32)
            window = window + (token,)
    offset = tl.zeros([BLOCK_D], tl.float32)
    if bias is not None:
        offset += tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)
    unfinished = _zeros(J - 1, BLOCK_D)
    dtaps = _zeros(J, BLOCK_D)
    doffset = tl.zeros([BLOCK_D], tl.float32)
    for step in range(0, BLOCK_T + J - 1, AHEAD):
        tokens, grads, reaches = (), (), ()
        for ahead in tl.static_range(AHEAD):
            at = first + step + ahead
            tokens = tokens + (_load_row(x_at, x_strides[1], at, size, columns, in_row),)
            grads = grads + (_load_row(dy_at, dy_strides[1], at, size, columns, in_row),)
            reaches = reaches + (tl.load(reach + begin + at, mask=at < size, other=-1).to(tl.int32),)
        for ahead in tl.static_range(AHEAD):
            at = first + step + ahead
            window = (tokens[ahead],) + window
            seen = ()
            for distance in tl.static_range(J):
                seen = seen + (tl.where(distance <= reaches[ahead], window[distance], 0.0),)
            window = window[: J - 1]
            grad = grads[ahead]
            if SILU:
                a = offset
                for distance in tl.static_range(J):
                    a += seen[distance] * taps[distance]
                sigmoid = 1 / (1 + tl.exp(-a))
                grad *= sigmoid * (1 + a * (1 - sigmoid))
            grad = tl.where(reaches[ahead] >= 0, grad, 0.0)
            own = tl.where(at < last, grad, 0.0)
            doffset += own
            dtokens, later = (), ()
            for distance in tl.static_range(J):
                later = later + (dtaps[distance] + own * seen[distance],)
                if distance > 0:
                    reaching = tl.where(distance <= reaches[ahead], grad, 0.0)
                    dtokens = dtokens + (unfinished[distance - 1] + reaching * taps[distance],)
                else:
                    dtokens = dtokens + (grad * taps[0],)
            dtaps = later
            unfinished = dtokens[: J - 1]
            done = at - (J - 1)
            mask = in_row & (done >= first) & (done < last)
            out_at = dx_at + done.to(tl.int64) * dx_strides[1] + columns
            tl.store(out_at, dtokens[J - 1].to(dx.dtype.element_ty), mask=mask)
            if done < 0:
                place = dbefore_at + at * dbefore_strides[2]
                tl.store(place, dtokens[J - 1].to(dbefore.dtype.element_ty), mask=in_row)
    sums_at = sums + (row * tl.num_programs(0) + tl.program_id(0)) * (J + 1) * D + columns
    for distance in tl.static_range(J):
        tl.store(sums_at + (J - 1 - distance) * D, dtaps[distance], mask=in_row)
    tl.store(sums_at + J * D, doffset, mask=in_row)


class _Launch:
    """Grids, bounds, reach and constants that the launches of a call share.

    Forward, the first block of a segment reads the tokens before it, and the others compute nothing for them.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bounds: Sequence[int], starts: Sequence[int], activation: str | None
    ) -> None:
        self.batch, _, self.channels = x.shape
        self.longest = max((end - begin for begin, end in zip(bounds[::2], bounds[1::2], strict=True)), default=0)
        self.segments, self.taps = len(bounds) // 2, weight.shape[1]
        self.bounds = _bounds_copy(tuple(bounds), x.device).tensor()
        self.reach = _reach_copy(tuple(bounds), tuple(starts), self.taps, x.device).tensor()
        self.weight = weight.t().float().contiguous()
        self.device = x.device
        self.constants = {"J": self.taps, "SILU": activation == "silu"}

    def _run(self, kernel: Any, programs: int, arguments: Sequence[Any], blocks: int, **constants: Any) -> None:
        """Launch `programs` for each block of channels and batch row; nothing for none."""
        grid = (programs, triton.cdiv(self.channels, constants["BLOCK_D"]), self.batch)
        if all(grid):
            with launch_device(self.device):
                kernel[grid](*arguments, blocks, self.channels, **self.constants, **constants)

    def forward(self, *arguments: Any) -> None:
        """Run `forward_kernel`."""
        block = BLOCK_T if self.taps <= 4 else BLOCK_T // 2
        assert self.taps <= block + 1, "only the first block reads the tokens before a segment"
        others = max(0, triton.cdiv(self.longest, block) - 1)
        for first, programs in ((True, self.segments), (False, self.segments * others)):
            sizes = {"FIRST": first, "BLOCK_T": block, "BLOCK_D": BLOCK_D}
            self._run(forward_kernel, programs, arguments, max(1, others), **sizes)

    @property
    def backward_blocks(self) -> int:
        """Blocks of tokens per segment of `backward_kernel`."""
        return max(1, triton.cdiv(self.longest, BACKWARD_T))

    def backward(self, *arguments: Any) -> None:
        """Run `backward_kernel`."""
        # 4 channels a thread with up to 4 taps; a channel more for each would not stay in registers.
        a_warp = 128 if self.taps <= 4 else 64 if self.taps <= 8 else 32
        width = min(BACKWARD_D, triton.next_power_of_2(self.channels))
        sizes = {"BLOCK_T": BACKWARD_T, "BLOCK_D": width, "AHEAD": AHEAD, "num_warps": max(1, width // a_warp)}
        self._run(backward_kernel, self.segments * self.backward_blocks, arguments, self.backward_blocks, **sizes)


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
    launch.forward(
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
    sums = torch.empty(
        x.shape[0] * launch.segments * launch.backward_blocks, taps + 1, channels, dtype=torch.float32, device=x.device
    )
    launch.backward(
        dy, dy.stride()[:2], x, x.stride()[:2], before, before.stride()[:3], launch.weight, bias, launch.reach,
        launch.bounds, dx, dx.stride()[:2], dbefore, dbefore.stride()[:3], sums,
    )  # fmt: skip
    total = sums.sum(dim=0)
    dweight = total[:taps].t().to(weight.dtype).contiguous()
    dbias = weight.new_empty(0) if bias is None else total[taps].to(bias.dtype)
    return dx, dweight, dbias, dbefore

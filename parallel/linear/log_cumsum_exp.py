"""Cumulative log-sum-exp per channel over ranks, with documents reset.

A slice needs only one number per channel from the slices before it: one all-gather. The gradient is a cumulative
log-sum-exp in reverse, over the logarithms of the gradients, so that nothing overflows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout
from longctx.parallel.linear.halo import check_tokens

LOG_ZERO = float("-inf")


def _document_runs(length: int, starts: Sequence[int]) -> list[slice]:
    """Split a slice of `length` tokens at document starts."""
    bounds = sorted({0, *starts, length})
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _exclusive_scan(
    totals: Sequence[Tensor], has_start: Sequence[bool], layout: Layout, *, reverse: bool
) -> list[Tensor]:
    """Return the log-sum-exp before each of this rank's slices (after it, if `reverse`), `[B, D]` each.

    An exclusive scan over the pieces of the sequence. `totals`: what each local slice contributes to the next.
    `has_start`: per piece, in scan order, whether a document start in it ends the running sum.
    """
    rows = torch.stack(list(totals))[None]
    if layout.comm_group is not None:
        rows = all_gather(rows[0], layout.comm_group).wait()
    order = range(layout.pieces - 1, -1, -1) if reverse else range(layout.pieces)
    before_piece, running = {}, torch.full_like(totals[0], LOG_ZERO)
    for number, reset in zip(order, has_start, strict=True):
        before_piece[number] = running
        rank, index = layout.piece_locations[number]
        terms = rows[rank if layout.comm_group is not None else 0, index]
        running = terms if reset else torch.logaddexp(running, terms)
    return [before_piece[number] for number in layout.pieces_of(layout.rank)]


def _all_starts(layout: Layout) -> list[tuple[int, ...]]:
    """Return the document starts of all pieces of the sequence, in order."""
    return [layout.starts(layout.piece(number)) for number in range(layout.pieces)]


def _forward_sums(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp up to each token, and up to the token before it, within its document."""
    z = torch.full_like(x, LOG_ZERO, memory_format=torch.contiguous_format)
    before = torch.full_like(z, LOG_ZERO)
    slices = list(zip(layout.local, map(layout.starts, layout.slices), strict=True))
    for at, starts in slices:
        for run in _document_runs(at.stop - at.start, starts):
            z[:, at][:, run] = x[:, at][:, run].logcumsumexp(dim=1)
    empty = torch.full_like(x[:, 0], LOG_ZERO)
    totals = [z[:, at.stop - 1] if at.start < at.stop else empty for at, _ in slices]
    has_start = [bool(starts) for starts in _all_starts(layout)]
    for (at, starts), incoming in zip(slices, _exclusive_scan(totals, has_start, layout, reverse=False), strict=True):
        local, first = z[:, at], starts[0] if starts else at.stop - at.start
        local[:, :first] = torch.logaddexp(local[:, :first], incoming[:, None])
        for run in _document_runs(at.stop - at.start, starts):
            before[:, at][:, run.start + 1 : run.stop] = local[:, run.start : run.stop - 1]
        if first > 0 and at.start < at.stop:
            before[:, at.start] = incoming
    return layout.zero_padding_(z), layout.zero_padding_(before)


def _backward_sums(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """Return the log-sum-exp of `a` from each token on and of `b` after it, within its document."""
    z = torch.full_like(a, LOG_ZERO, memory_format=torch.contiguous_format)
    slices = list(zip(layout.local, map(layout.starts, layout.slices), strict=True))
    for at, starts in slices:
        for run in _document_runs(at.stop - at.start, starts):
            # Token t contributes its a and b to the tokens before it.
            terms = torch.logaddexp(a[:, at][:, run], b[:, at][:, run])
            from_end = terms.flip(1).logcumsumexp(dim=1).flip(1)
            local = z[:, at][:, run]
            local.copy_(a[:, at][:, run])
            local[:, :-1] = torch.logaddexp(local[:, :-1], from_end[:, 1:])
    firsts = [slice(0, starts[0] if starts else at.stop - at.start) for at, starts in slices]
    totals = [
        torch.logaddexp(a[:, at][:, first], b[:, at][:, first]).logsumexp(dim=1)
        for (at, _), first in zip(slices, firsts, strict=True)
    ]
    has_start = [bool(starts) for starts in reversed(_all_starts(layout))]
    for (at, starts), incoming in zip(slices, _exclusive_scan(totals, has_start, layout, reverse=True), strict=True):
        last = slice(starts[-1] if starts else 0, at.stop - at.start)
        z[:, at][:, last] = torch.logaddexp(z[:, at][:, last], incoming[:, None])
    return z


class _LogCumSumExp(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        z, before = _forward_sums(x, layout)
        ctx.save_for_backward(x, z, before)
        ctx.layout = layout
        return z, before

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, before = ctx.saved_tensors
        dz, dbefore = grads
        # dx_j = sum_{t >= j} dz_t exp(x_j - z_t) + sum_{t > j} dbefore_t exp(x_j - before_t). Empty sums (-inf) have no
        # gradient.
        dz, dbefore = (torch.where(y == LOG_ZERO, 0.0, d) for y, d in ((z, dz), (before, dbefore)))
        z, before = (torch.where(y == LOG_ZERO, 0.0, y) for y in (z, before))
        # Positive and negative parts as separate channels, since logarithms have no sign.
        a, b = (torch.cat([d.clamp(min=0).log(), (-d).clamp(min=0).log()], dim=-1) for d in (dz, dbefore))
        doubled = torch.cat([z, z], dim=-1), torch.cat([before, before], dim=-1)
        positive, negative = _backward_sums(a - doubled[0], b - doubled[1], ctx.layout).chunk(2, dim=-1)
        return ctx.layout.zero_padding_(torch.exp(x + positive) - torch.exp(x + negative)), None


def log_cumsum_exp(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compute `z_t = log sum_{s <= t} exp(x_s)` over t's document, and z of the token before t.

    Shapes: x and both results `[B, T_local, D]`, float32 or float64. The second result is -inf at a document's first
    token; both are 0 for padding. Differentiable. The sum starts empty also where the layout has `past_tokens`. Raises
    ValueError where x does not fit.
    """
    check_tokens(x, layout)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}: expected torch.float32 or torch.float64")
    return _LogCumSumExp.apply(x, layout)  # type: ignore[no-untyped-call]

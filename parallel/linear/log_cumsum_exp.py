"""The running log-sum-exp of each channel over a sequence that lies over ranks, documents reset.

A slice's own running values need of the slices before it one number for each channel; one all-gather brings them. The
gradient is a running log-sum-exp from the other end, of the logarithms of the gradients, so that nothing overflows.
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

NOTHING = float("-inf")


def _runs(length: int, starts: Sequence[int]) -> list[slice]:
    """The parts of a slice between the starts of documents."""
    bounds = sorted({0, *starts, length})
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def _reaching(own: Sequence[Tensor], closed: Sequence[bool], layout: Layout, *, reverse: bool) -> list[Tensor]:
    """What reaches each of this rank's slices from those before it (behind it, in reverse): `[B, D]` each.

    `own` is what each local slice hands on of itself, `closed` tells for every slice of the sequence, in the order in
    which they follow each other, whether a document's start keeps what reaches it from going on.
    """
    rows = torch.stack(list(own))[None]
    if layout.peers is not None:
        rows = all_gather(rows[0], layout.peers).wait()
    order = range(layout.pieces - 1, -1, -1) if reverse else range(layout.pieces)
    reaching, running = {}, torch.full_like(own[0], NOTHING)
    for number, shut in zip(order, closed, strict=True):
        reaching[number] = running
        rank, place = layout.places[number]
        handed = rows[rank if layout.peers is not None else 0, place]
        running = handed if shut else torch.logaddexp(running, handed)
    return [reaching[number] for number in layout.numbers(layout.rank)]


def _every_start(layout: Layout) -> list[tuple[int, ...]]:
    """The starts of all slices of the sequence, in order."""
    return [layout.starts(layout.piece(number)) for number in range(layout.pieces)]


def _running(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """log-sum-exp up to each token and up to the one before it, within its document."""
    z = torch.full_like(x, NOTHING, memory_format=torch.contiguous_format)
    before = torch.full_like(z, NOTHING)
    parts = list(zip(layout.local, map(layout.starts, layout.slices), strict=True))
    for at, starts in parts:
        for run in _runs(at.stop - at.start, starts):
            z[:, at][:, run] = x[:, at][:, run].logcumsumexp(dim=1)
    nothing = torch.full_like(x[:, 0], NOTHING)
    own = [z[:, at.stop - 1] if at.start < at.stop else nothing for at, _ in parts]
    closed = [bool(starts) for starts in _every_start(layout)]
    for (at, starts), reached in zip(parts, _reaching(own, closed, layout, reverse=False), strict=True):
        local, first = z[:, at], starts[0] if starts else at.stop - at.start
        local[:, :first] = torch.logaddexp(local[:, :first], reached[:, None])
        for run in _runs(at.stop - at.start, starts):
            before[:, at][:, run.start + 1 : run.stop] = local[:, run.start : run.stop - 1]
        if first > 0 and at.start < at.stop:
            before[:, at.start] = reached
    return layout.zero_padding_(z), layout.zero_padding_(before)


def _running_back(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """log-sum-exp of `a` from each token on and of `b` behind it, within its document."""
    z = torch.full_like(a, NOTHING, memory_format=torch.contiguous_format)
    parts = list(zip(layout.local, map(layout.starts, layout.slices), strict=True))
    for at, starts in parts:
        for run in _runs(at.stop - at.start, starts):
            # What token t hands to those before it: its own a and b.
            handed = torch.logaddexp(a[:, at][:, run], b[:, at][:, run])
            from_end = handed.flip(1).logcumsumexp(dim=1).flip(1)
            local = z[:, at][:, run]
            local.copy_(a[:, at][:, run])
            local[:, :-1] = torch.logaddexp(local[:, :-1], from_end[:, 1:])
    firsts = [slice(0, starts[0] if starts else at.stop - at.start) for at, starts in parts]
    own = [
        torch.logaddexp(a[:, at][:, first], b[:, at][:, first]).logsumexp(dim=1)
        for (at, _), first in zip(parts, firsts, strict=True)
    ]
    closed = [bool(starts) for starts in reversed(_every_start(layout))]
    for (at, starts), reached in zip(parts, _reaching(own, closed, layout, reverse=True), strict=True):
        last = slice(starts[-1] if starts else 0, at.stop - at.start)
        z[:, at][:, last] = torch.logaddexp(z[:, at][:, last], reached[:, None])
    return z


class _LogCumSumExp(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        z, before = _running(x, layout)
        ctx.save_for_backward(x, z, before)
        ctx.layout = layout
        return z, before

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, z, before = ctx.saved_tensors
        dz, dbefore = grads
        # dx_j = sum_{t >= j} dz_t exp(x_j - z_t) + sum_{t > j} dbefore_t exp(x_j - before_t). Where nothing is before a
        # token, its gradient goes nowhere.
        dz, dbefore = (torch.where(y == NOTHING, 0.0, d) for y, d in ((z, dz), (before, dbefore)))
        z, before = (torch.where(y == NOTHING, 0.0, y) for y in (z, before))
        # The signs apart, as channels, since a logarithm has none.
        a, b = (torch.cat([d.clamp(min=0).log(), (-d).clamp(min=0).log()], dim=-1) for d in (dz, dbefore))
        twice = torch.cat([z, z], dim=-1), torch.cat([before, before], dim=-1)
        more, less = _running_back(a - twice[0], b - twice[1], ctx.layout).chunk(2, dim=-1)
        return ctx.layout.zero_padding_(torch.exp(x + more) - torch.exp(x + less)), None


def log_cumsum_exp(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """`z_t = log sum_{s <= t} exp(x_s)` over the tokens of t's document, and z of the token before t.

    Shapes: x, z and the other `[B, T_local, D]`, float32 or float64; the second is -inf where t begins a document, and
    both are 0 for padding.
    Differentiable. A layout whose first document is continued begins with nothing all the same. Raises ValueError where
    x does not fit.
    """
    check_tokens(x, layout)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is {x.dtype}: expected torch.float32 or torch.float64")
    return _LogCumSumExp.apply(x, layout)  # type: ignore[no-untyped-call]

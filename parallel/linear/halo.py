"""Halo exchange: the tokens before each slice of a sequence that is split over ranks.

Every rank sends the last tokens of its slices, and each slice receives those before it, from several slices where these
are shorter than the halo. Backward, every rank sends the gradients of its halos, and each rank sums those of its own
tokens in the accumulation dtype, in sequence order.

Forward is one all-gather of `N * B * min(width, slice) * D` numbers per rank, backward one of `N * B * width * D`. A
reduce-scatter backward would carry as many, and more where the tokens before the sequence have a gradient, which every
rank receives; it would carry fewer only where slices are shorter than the halo.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout


def _tail_length(layout: Layout, width: int) -> int:
    """Return how many of a slice's last tokens are sent."""
    return min(width, layout.piece_length)


def _piece_ends(layout: Layout) -> list[int]:
    """Return where this rank's pieces end in its tensors, padding included: padding is at the sequence's end."""
    return [(index + 1) * layout.piece_length for index in range(len(layout.slices))]


def _all_gather_pieces(parts: Tensor, layout: Layout) -> list[Tensor]:
    """All-gather `parts [N, ...]`, one per local piece, into a list of all pieces' parts in sequence order."""
    group = layout.comm_group
    if group is None:
        return list(parts.unbind())
    rows = all_gather(parts, group).wait()
    return [rows[rank, index] for rank, index in layout.piece_locations]


def gather_halos(x: Tensor, layout: Layout, width: int, initial: Tensor | None) -> Tensor:
    """Return the halos of this rank's slices, `[N, B, width, D]`: the forward of `left_halo`, without checks."""
    first = x.new_zeros(x.shape[0], width, x.shape[2]) if initial is None else initial
    if layout.size == 1 or width == 0:
        return torch.stack([first] * len(layout.slices))
    tail = _tail_length(layout, width)
    tails = _all_gather_pieces(torch.stack([x[:, end - tail : end] for end in _piece_ends(layout)]), layout)
    sources = ceil(width / tail)
    halos = [torch.cat([first, *tails[max(0, n - sources) : n]], dim=1) for n in layout.pieces_of(layout.rank)]
    return torch.stack([halo[:, halo.shape[1] - width :] for halo in halos])


def reduce_halo_grads(dhalo: Tensor, layout: Layout) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of this rank's tokens from `dhalo [N, B, width, D]`: the backward of `gather_halos`.

    One tensor per slice, the gradient of its last `min(width, slice)` tokens; and the gradient of `initial`
    `[B, width, D]`, the same on every rank. All in the accumulation dtype.
    """
    dtype, width = accumulation_dtype(dhalo.dtype), dhalo.shape[2]
    tail = _tail_length(layout, width)
    dtails = [dhalo.new_zeros(dhalo.shape[1], tail, dhalo.shape[3], dtype=dtype) for _ in layout.slices]
    dinitial = dhalo.new_zeros(dhalo.shape[1:], dtype=dtype)
    if width == 0:
        return dtails, dinitial
    grads = _all_gather_pieces(dhalo, layout)
    sources = ceil(width / tail)
    for number, dtail in zip(layout.pieces_of(layout.rank), dtails, strict=True):
        for reader in range(number + 1, min(number + sources + 1, layout.pieces)):
            offset = width - (reader - number) * tail
            dtail[:, max(0, -offset) :] += grads[reader][:, max(0, offset) : offset + tail]
    for reader in range(min(sources, layout.pieces)):
        dinitial[:, reader * tail :] += grads[reader][:, : width - reader * tail]
    return dtails, dinitial


def add_to_tails(dx: Tensor, dtails: Sequence[Tensor], layout: Layout) -> None:
    """Add the gradients of the slices' last tokens to `dx [B, T_local, D]`, in place."""
    for end, dtail in zip(_piece_ends(layout), dtails, strict=True):
        dx[:, end - dtail.shape[1] : end] += dtail


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, layout: Layout, width: int, initial: Tensor | None) -> Tensor:
        ctx.layout, ctx.shape = layout, x.shape
        return gather_halos(x, layout, width, initial)

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtails, dinitial = reduce_halo_grads(grads[0], ctx.layout)
        dx = grads[0].new_zeros(ctx.shape)
        add_to_tails(dx, dtails, ctx.layout)
        return dx, None, None, dinitial.to(dx.dtype) if ctx.needs_input_grad[3] else None


def check_tokens(x: Tensor, layout: Layout) -> None:
    """Raise ValueError where x is not `[B, T_local, D]`."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: expected [batch, tokens, channels]")
    layout.check_length("x", x)


def check_initial(initial: Tensor, x: Tensor, layout: Layout, width: int) -> None:
    """Raise ValueError where initial is not `[B, width, D]` like x, or the layout would ignore it."""
    if not layout.past_tokens:
        raise ValueError("initial is given, but the layout has past_tokens = 0 and would ignore it")
    shape = [x.shape[0], width, x.shape[2]]
    if list(initial.shape) != shape:
        raise ValueError(f"initial has shape {list(initial.shape)}: expected [batch, width, channels] = {shape}")
    if initial.dtype != x.dtype or initial.device != x.device:
        raise ValueError(f"initial is {initial.dtype} on {initial.device}: expected {x.dtype} on {x.device}, as for x")


def left_halo(x: Tensor, layout: Layout, width: int, *, initial: Tensor | None = None) -> Tensor:
    """Return the `width` tokens before each of this rank's slices in the whole sequence, `[N, B, width, D]`.

    The N slices are in local order (N is 1, or 2 in zigzag order over several ranks). Documents are ignored: the caller
    masks the tokens of other documents. Before the sequence are `initial [B, width, D]`, the same on every rank, zeros
    by default; only a layout with `past_tokens` may have them.

    Shapes: x `[B, T_local, D]`. Differentiable in x and initial: gradients are summed on the rank that holds the token,
    and that of initial is the same on every rank. All ranks have to take part in the backward pass. Raises ValueError,
    naming the argument, where one does not fit.
    """
    check_tokens(x, layout)
    if width < 0:
        raise ValueError(f"width is {width}: expected a number of tokens")
    if initial is not None:
        check_initial(initial, x, layout, width)
    return _LeftHalo.apply(x, layout, width, initial)  # type: ignore[no-untyped-call]

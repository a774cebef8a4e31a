"""The tokens that precede each slice of a sequence that lies over ranks.

Every rank sends the last tokens of its slices, and each slice takes those before it, from several slices where slices
are shorter than the halo. Backward, every rank sends the gradients of its halos, and each takes what is of its tokens,
summed in the accumulation dtype in the order of the sequence.

How they travel is known here alone: one all-gather forward, of `N * B * min(width, slice) * D` numbers a rank, and one
backward, of `N * B * width * D`. Backward a reduce-scatter would carry as many, or more where the tokens before the
sequence have a gradient, which every rank is given; it would carry fewer only where slices are shorter than the halo.
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


def _reach(layout: Layout, width: int) -> int:
    """The tokens of a slice that halos can hold."""
    return min(width, layout.piece_length)


def _ends(layout: Layout) -> list[int]:
    """Where the pieces of this rank end in its tensors, padding included: only padding follows it in the sequence."""
    return [(place + 1) * layout.piece_length for place in range(len(layout.slices))]


def _in_sequence_order(parts: Tensor, layout: Layout) -> list[Tensor]:
    """One tensor for each slice of the sequence, from `parts [N, ...]` of this rank's."""
    group = layout.peers
    if group is None:
        return list(parts.unbind())
    rows = all_gather(parts, group).wait()
    return [rows[rank, place] for rank, place in layout.places]


def receive(x: Tensor, layout: Layout, width: int, initial: Tensor | None) -> Tensor:
    """The forward of `left_halo`, by itself: `[N, B, width, D]`, not checked."""
    first = x.new_zeros(x.shape[0], width, x.shape[2]) if initial is None else initial
    if layout.size == 1 or width == 0:
        return torch.stack([first] * len(layout.slices))
    reach = _reach(layout, width)
    tails = _in_sequence_order(torch.stack([x[:, end - reach : end] for end in _ends(layout)]), layout)
    sources = ceil(width / reach)
    halos = [torch.cat([first, *tails[max(0, n - sources) : n]], dim=1) for n in layout.numbers(layout.rank)]
    return torch.stack([halo[:, halo.shape[1] - width :] for halo in halos])


def give_back(dhalo: Tensor, layout: Layout) -> tuple[list[Tensor], Tensor]:
    """The backward of `receive`: what `dhalo [N, B, width, D]` of all ranks is of this rank's tokens.

    Returns for each of this rank's slices the gradient of its last `min(width, slice)` tokens, and that of `initial`
    `[B, width, D]`, the same on every rank, all in the accumulation dtype.
    """
    dtype, width = accumulation_dtype(dhalo.dtype), dhalo.shape[2]
    reach = _reach(layout, width)
    dtails = [dhalo.new_zeros(dhalo.shape[1], reach, dhalo.shape[3], dtype=dtype) for _ in layout.slices]
    dinitial = dhalo.new_zeros(dhalo.shape[1:], dtype=dtype)
    if width == 0:
        return dtails, dinitial
    grads = _in_sequence_order(dhalo, layout)
    sources = ceil(width / reach)
    for number, dtail in zip(layout.numbers(layout.rank), dtails, strict=True):
        for reader in range(number + 1, min(number + sources + 1, layout.pieces)):
            place = width - (reader - number) * reach
            dtail[:, max(0, -place) :] += grads[reader][:, max(0, place) : place + reach]
    for reader in range(min(sources, layout.pieces)):
        dinitial[:, reader * reach :] += grads[reader][:, : width - reader * reach]
    return dtails, dinitial


def add_to_tails(dx: Tensor, dtails: Sequence[Tensor], layout: Layout) -> None:
    """Add the gradients of the slices' last tokens to `dx [B, T_local, D]`, in place."""
    for end, dtail in zip(_ends(layout), dtails, strict=True):
        dx[:, end - dtail.shape[1] : end] += dtail


class _LeftHalo(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, layout: Layout, width: int, initial: Tensor | None) -> Tensor:
        ctx.layout, ctx.shape = layout, x.shape
        return receive(x, layout, width, initial)

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtails, dinitial = give_back(grads[0], ctx.layout)
        dx = grads[0].new_zeros(ctx.shape)
        add_to_tails(dx, dtails, ctx.layout)
        return dx, None, None, dinitial.to(dx.dtype) if ctx.needs_input_grad[3] else None


def check_tokens(x: Tensor, layout: Layout) -> None:
    """Raise ValueError where x is not `[B, T_local, D]`."""
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}: expected [batch, tokens, channels]")
    if x.shape[1] != layout.local_length:
        raise ValueError(
            f"x has {x.shape[1]} tokens: expected the {layout.local_length} that the layout gives this rank"
        )


def check_initial(initial: Tensor, x: Tensor, layout: Layout, width: int) -> None:
    """Raise ValueError where initial is not `[B, width, D]` like x, or the layout would drop it."""
    if not layout.past_tokens:
        raise ValueError("initial is given, but the layout's first document is not continued and would drop it")
    shape = [x.shape[0], width, x.shape[2]]
    if list(initial.shape) != shape:
        raise ValueError(f"initial has shape {list(initial.shape)}: expected [batch, width, channels] = {shape}")
    if initial.dtype != x.dtype or initial.device != x.device:
        raise ValueError(
            f"initial is {initial.dtype} on {initial.device}: expected {x.dtype} on {x.device}, as x has them"
        )


def left_halo(x: Tensor, layout: Layout, width: int, *, initial: Tensor | None = None) -> Tensor:
    """The `width` tokens that precede each of this rank's slices in the whole sequence, `[N, B, width, D]`.

    In the order in which the slices lie here (N is 1, in zigzag order over several ranks 2). Documents are not looked
    at: who reads a halo drops what belongs to another one. Where the sequence begins, `initial [B, width, D]` precedes
    it, zeros by default; only a layout whose first document is `past_tokens` may have one, the same on every rank.

    Shapes: x `[B, T_local, D]`. Differentiable in x and initial: each gradient goes back to the rank that holds the
    token and is added there; that of initial is the same on every rank. Every rank has to take part in the backward
    pass. Raises ValueError where an argument does not fit, naming it.
    """
    check_tokens(x, layout)
    if width < 0:
        raise ValueError(f"width is {width}: expected a number of tokens")
    if initial is not None:
        check_initial(initial, x, layout, width)
    return _LeftHalo.apply(x, layout, width, initial)  # type: ignore[no-untyped-call]

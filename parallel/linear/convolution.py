"""The short causal convolution over a sequence that lies over ranks.

A slice needs of the slices before it W - 1 tokens (`longctx.parallel.linear.halo`), whatever the length of the
sequence.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels import convolution
from longctx.kernels.linear.recurrence import Segment
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.layout import Layout
from longctx.parallel.linear.halo import add_to_tails, check_initial, check_tokens, give_back, receive


def _segments(layout: Layout) -> tuple[Segment, ...]:
    at = zip(layout.local, layout.slices, strict=True)
    return tuple(Segment(local.start, local.stop, layout.starts(part)) for local, part in at)


def _hide_(halos: Tensor, layout: Layout) -> Tensor:
    """Zero in `halos [N, B, W - 1, D]` what is of another document than the token behind it, in place.

    A document may begin in the last W - 2 tokens before a slice; in the slice nothing tells.
    """
    width = halos.shape[2]
    for halo, part in zip(halos, layout.slices, strict=True):
        begin = layout.document_start(part.begin)
        # The first document has no start: before it are zeros, or what it continues from.
        halo[:, : max(0, width - (part.begin - begin)) if begin else 0] = 0
    return halos


class _ShortConvolution(torch.autograd.Function):
    # One function, and not `left_halo` before `causal_convolution`: autograd would add two gradients of x as long as
    # the sequence, one of them zero but for W - 1 tokens.

    @staticmethod
    @rank_forward
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial: Tensor | None,
        layout: Layout,
        activation: str | None,
    ) -> Tensor:
        before = _hide_(receive(x, layout, weight.shape[1] - 1, initial), layout)
        ctx.save_for_backward(x, weight, bias, before)
        ctx.layout, ctx.segments, ctx.activation = layout, _segments(layout), activation
        return layout.zero_padding_(convolution.forward(x, weight, bias, before, ctx.segments, activation))

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        dx, dweight, dbias, dbefore = convolution.backward(
            grads[0], x, weight, bias, before, ctx.segments, ctx.activation
        )
        dtails, dinitial = give_back(_hide_(dbefore, ctx.layout), ctx.layout)
        add_to_tails(ctx.layout.zero_padding_(dx), dtails, ctx.layout)
        return dx, dweight, dbias, dinitial.to(x.dtype) if ctx.needs_input_grad[3] else None, None, None


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    activation: str | None = None,
    *,
    initial: Tensor | None = None,
) -> Tensor:
    """`longctx.kernels.convolution.causal_convolution` over a sequence that lies over ranks, documents reset.

    Shapes: x `[B, T_local, D]`, this rank's tokens; weight `[D, W]`, its last column for the token itself; bias `[D]`
    or None; activation None or "silu". initial `[B, W - 1, D]`, the same on every rank, is what the first document
    continues from, zeros by default; only a layout whose first document is `past_tokens` may have one.

    Returns `[B, T_local, D]` in x's dtype. Differentiable in every tensor: the gradients of weight and bias are this
    rank's share, to be summed, that of initial is the same on every rank. Raises ValueError where an argument does not
    fit, naming it.
    """
    convolution.check_arguments(x, weight, bias, activation, "[batch, tokens, channels]")
    check_tokens(x, layout)
    if initial is not None:
        check_initial(initial, x, layout, weight.shape[1] - 1)
    return _ShortConvolution.apply(x, weight, bias, initial, layout, activation)  # type: ignore[no-untyped-call]

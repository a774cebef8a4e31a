"""Short causal convolution over ranks, with documents reset.

A slice needs only the J - 1 tokens before it (`longctx.parallel.linear.halo`), whatever the sequence length.
"""

from typing import Any

import torch
from torch import Tensor

from longctx.kernels import convolution
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.layout import Layout
from longctx.parallel.linear.halo import add_to_tails, check_initial, check_tokens, gather_halos, reduce_halo_grads


def _mask_documents_(halos: Tensor, layout: Layout) -> Tensor:
    """Zero the tokens of earlier documents in `halos [N, B, J - 1, D]`, in place.

    A document may start in the last J - 2 tokens before a slice, which the slice's own starts do not include.
    """
    width = halos.shape[2]
    for halo, part in zip(halos, layout.slices, strict=True):
        begin = layout.document_start(part.begin)
        # The first document may use its whole halo: before it are zeros, or the tokens that it continues.
        halo[:, : max(0, width - (part.begin - begin)) if begin else 0] = 0
    return halos


class _ShortConvolution(torch.autograd.Function):
    # One function instead of `left_halo` and `causal_convolution`: autograd would add two full-length gradients of x,
    # one of them zero except for J - 1 tokens.

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
        before = _mask_documents_(gather_halos(x, layout, weight.shape[1] - 1, initial), layout)
        ctx.save_for_backward(x, weight, bias, before)
        ctx.layout, ctx.segments, ctx.activation = layout, layout.segments, activation
        return layout.zero_padding_(convolution.forward(x, weight, bias, before, ctx.segments, activation))

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        dx, dweight, dbias, dbefore = convolution.backward(
            grads[0], x, weight, bias, before, ctx.segments, ctx.activation
        )
        dtails, dinitial = reduce_halo_grads(_mask_documents_(dbefore, ctx.layout), ctx.layout)
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
    """Compute `longctx.kernels.convolution.causal_convolution` over ranks; documents reset.

    Shapes: x `[B, T_local, D]`, this rank's tokens; weight `[D, J]`, its last column for the token itself; bias `[D]`
    or None; activation None or "silu". initial `[B, J - 1, D]`, the same on every rank, are the tokens before the
    sequence, zeros by default; only a layout with `past_tokens` may have them.

    Returns `[B, T_local, D]` in x's dtype. Differentiable in every tensor: the gradients of weight and bias are this
    rank's summand, that of initial is the same on every rank. Raises ValueError, naming the argument, where one does
    not fit.
    """
    convolution.check_arguments(x, weight, bias, activation, "[batch, tokens, channels]")
    check_tokens(x, layout)
    if initial is not None:
        check_initial(initial, x, layout, weight.shape[1] - 1)
    return _ShortConvolution.apply(x, weight, bias, initial, layout, activation)  # type: ignore[no-untyped-call]

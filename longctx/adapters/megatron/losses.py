"""A layer's own loss in Megatron's backward pass, at the scale of the model's."""

from typing import Any

import torch
from megatron.core import num_microbatches_calculator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, config: TransformerConfig, factor: float) -> Tensor:
        ctx.config, ctx.factor, ctx.dtype, ctx.device = config, factor, loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.full((), ctx.factor, dtype=ctx.dtype, device=ctx.device)
        if ctx.config.grad_scale_func is not None:
            grad = ctx.config.grad_scale_func(grad)
        return grads[0], grad, None, None


def attach(out: Tensor, loss: Tensor, config: TransformerConfig, factor: float) -> Tensor:
    """`out` itself, which brings into the backward pass the gradient of a loss times a factor.

    loss: this rank's share; the shares of the context- and tensor-parallel ranks add up to the loss of a micro-batch.
    """
    return _Attach.apply(out, loss, config, factor)  # type: ignore[no-untyped-call]


def mean_over_batches(config: TransformerConfig, cp: int, tokens: int) -> float:
    """The factor with which the step's loss has the mean over its micro-batches, of `tokens` tokens over all ranks:
    Megatron divides gradients by the number of data- and context-parallel ranks, or with `calculate_per_token_loss` by
    the tokens of the step."""
    if config.calculate_per_token_loss:
        return tokens
    known = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None
    return cp / (num_microbatches_calculator.get_num_microbatches() if known else 1)

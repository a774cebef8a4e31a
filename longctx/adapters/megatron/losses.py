"""Auxiliary losses of layers in Megatron's backward pass, at the scale of the model's loss."""

from typing import Any

import torch
from megatron.core import num_microbatches_calculator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _AttachAuxiliaryLoss(torch.autograd.Function):
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


def attach_auxiliary_loss(out: Tensor, loss: Tensor, config: TransformerConfig, factor: float) -> Tensor:
    """Return `out`; its backward pass also backpropagates `loss` times a factor, and Megatron's loss scale.

    loss: this rank's share; the shares of the context- and tensor-parallel ranks sum to the loss of a micro-batch. (As
    Megatron's `MoEAuxLossAutoScaler`, with a factor per loss.)
    """
    return _AttachAuxiliaryLoss.apply(out, loss, config, factor)  # type: ignore[no-untyped-call]


def auxiliary_loss_scale(config: TransformerConfig, cp: int, tokens: int) -> float:
    """Return the factor that makes an auxiliary loss the mean over the step's micro-batches, of `tokens` tokens each
    over all ranks: Megatron divides gradients by the data- and context-parallel ranks, or by the step's tokens with
    `calculate_per_token_loss`."""
    if config.calculate_per_token_loss:
        return tokens
    initialized = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None
    return cp / (num_microbatches_calculator.get_num_microbatches() if initialized else 1)

"""Equations of the feed-forwards: SwiGLU and the mixture of experts, expert by expert."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig
from longctx.verify.equations.common import (
    LayerContext,
    Parameters,
    attention_weights,
    expect_size,
    sigmoid,
    silu,
    visible,
)
from longctx.verify.equations.routing import expert_scores, expert_weights, jitter

Attention = Callable[[], Tensor]
"""Returns the weights of the block's softmax attention, `[B, H, T, T]`."""


def gated_unit(x: Tensor, gate_up: Tensor, down: Tensor, hidden: int) -> Tensor:
    """Compute `(SiLU(x W_gate) * (x W_up)) W_down`; gate and up are the halves of one matrix `[2 hidden, D]`.

    Raises ValueError for another hidden width.
    """
    expect_size("the hidden width of a feed-forward", down.shape[1], hidden)
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (silu(gate) * up) @ down.T


def swiglu(
    p: Parameters, x: Tensor, c: SwigluConfig, context: LayerContext, attention: Attention
) -> tuple[Tensor, Tensor | None]:
    """Compute SwiGLU for x `[B, T, D]`; it has no auxiliary loss. The hidden width is 8/3 D in 64s if not set."""
    del attention, context
    return gated_unit(x, p.gate_up.weight, p.down.weight, c.hidden or math.ceil(8 * x.shape[-1] / 3 / 64) * 64), None


def moe(
    p: Parameters, x: Tensor, c: MoeConfig, context: LayerContext, attention: Attention
) -> tuple[Tensor, Tensor | None]:
    """Compute the mixture of experts in training for x `[B, T, D]`: its output, and its auxiliary losses."""
    seen = x * jitter(x, c.jitter, context) if c.jitter else x
    logits = seen @ p.router.weight.T
    scores = expert_scores(logits, c)
    if c.router == "similarity":
        q, k = (y[:, :, None] for y in (seen @ p.similarity.weight.T).chunk(2, dim=-1))
        expect_size("the width of a similarity", q.shape[-1], c.similarity_dim or min(64, x.shape[-1]))
        scale = 1 / ((c.temperature or 1.0) * q.shape[-1] ** 0.5)
        scores = attention_weights(q, k, visible(context), scale)[:, 0] @ scores
    elif c.router == "attention":
        scores = attention().mean(dim=1) @ scores
    weights, loss = expert_weights(scores, logits, c, p.bias if c.bias_rate else None)
    out = torch.zeros_like(x)
    for e in range(c.experts):
        at = weights[..., e].nonzero(as_tuple=True)
        y = gated_unit(x[at], p.experts.gate_up[e], p.experts.down[e], c.hidden)
        out = out.index_put(at, weights[..., e][at][:, None] * y, accumulate=True)
    if c.shared:
        hidden = c.shared_hidden or c.shared * c.hidden
        shared = gated_unit(x, p.shared.gate_up.weight, p.shared.down.weight, hidden)
        out = out + (sigmoid(x @ p.shared_gate.weight.T) * shared if c.shared_gate else shared)
    return out, loss

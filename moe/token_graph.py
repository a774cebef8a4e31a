"""Similarity-aware and attention-aware expert routing: scores averaged over a graph of tokens before the choice.

With r_j the scores of token j for the experts (Nguyen et al. 2025, "Improving Routing in Sparse Mixture of Experts
with Graph of Tokens"):

    similarity-aware   r~_i = sum_j S_ij r_j,   S = softmax_j(u_i^T W_s u_j / tau),   W_s = W_a^T W_b of low rank
    attention-aware    r~_i = sum_j A_ij r_j,   A the attention of the block's softmax layer, averaged over its heads

over the tokens j <= i of the same document, so routing is causal. The choice and its auxiliary losses then use r~ in
place of r (`longctx.moe.expert_router.choose_experts`).

Both are computed as attention with r as the values: no matrix over pairs of tokens exists, and every layout, packing
and schedule of `longctx.parallel.attention` applies. Queries and keys are cast to r's dtype, float32 or higher:
averages over many tokens are close together, and rounded to the 8 bits of bf16 many experts would have equal scores.
"""

import torch
from torch import Tensor

from longctx.kernels.attention.block import CAUSAL_MASK, Mask
from longctx.parallel.attention.api import rank_schedules, softmax_attention
from longctx.parallel.attention.cost_model import AttentionShape, ScheduleEstimate, fitting
from longctx.parallel.layout import Layout


def similarity_aware(r: Tensor, q: Tensor, k: Tensor, layout: Layout, scale: float) -> Tensor:
    """Average scores over similar tokens: r~ `[B, T_local, E]` in r's dtype, zero for padding.

    Shapes: r `[B, T_local, E]`; q = W_a u and k = W_b u, `[B, T_local, K]`. `scale` is 1 / tau. The schedule is the
    layout's if it supports one head, else all-gather, since Ulysses splits heads. Differentiable in r, q and k; a
    collective over the layout's ranks, in the backward pass as well. Raises ValueError if shapes do not match.
    """
    q, k, values = (x.to(r.dtype)[:, :, None] for x in (q, k, r))
    return softmax_attention(q, k, values, layout, scale, schedule=one_head_schedule(layout))[:, :, 0]


def attention_aware(r: Tensor, q: Tensor, k: Tensor, layout: Layout, scale: float, mask: Mask = CAUSAL_MASK) -> Tensor:
    """Average scores by the attention of a softmax layer: r~ `[B, T_local, E]` in r's dtype, zero for padding.

    Shapes: r `[B, T_local, E]`; the layer's q `[B, T_local, H, K]` and k `[B, T_local, H_kv, K]`, after rotary
    embedding, with its scale and mask. Differentiable in r, q and k; a collective over the layout's ranks, in the
    backward pass as well. Raises ValueError if shapes do not match.
    """
    values = r[:, :, None].expand(-1, -1, k.shape[2], -1)
    return softmax_attention(q.to(r.dtype), k.to(r.dtype), values, layout, scale, mask=mask).mean(dim=2)


def one_head_schedule(layout: Layout) -> str:
    """Return the layout's attention schedule if it supports one head, else all-gather."""
    ulysses = 1 if layout.grid is None else layout.grid.ulysses
    fits = layout.attention == "auto" or layout.attention in fitting(1, layout.size, ulysses)
    return layout.attention if fits else "all-gather"


def similarity_estimates(layout: Layout, width: int, experts: int, dtype: torch.dtype) -> list[ScheduleEstimate]:
    """Estimate the time of each schedule for `similarity_aware` with K = `width`, fastest first."""
    return rank_schedules(layout, AttentionShape(1, 1, width, experts, dtype.itemsize, CAUSAL_MASK))

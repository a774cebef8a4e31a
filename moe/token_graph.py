"""Scores that a token shares with tokens like it: experts are chosen by neighbours in a graph of tokens together.

With r_j each token's own scores for the experts (Nguyen et al. 2025, "Improving Routing in Sparse Mixture of Experts
with Graph of Tokens"):

    similarity-aware   r~_i = sum_j S_ij r_j,   S = softmax_j(u_i^T W_s u_j / tau),   W_s = W_a^T W_b of low rank
    attention-aware    r~_i = sum_j A_ij r_j,   A the attention of the block's softmax layer, the mean of its heads

over the tokens j of the same document up to i itself, so that what comes later changes nothing before it. The choice
and its losses then take r~ in the place of r (`longctx.moe.expert_router.choose_experts`).

Both are attention with r as the values, and that is how they are computed: no matrix over pairs of tokens exists, and
any layout, packing and schedule of `longctx.parallel.attention` serves. Queries and keys are computed with in r's
dtype, float32 or higher, whatever they were projected in: averages over many tokens lie close together, and rounded to
bf16, which has 8 bits, neighbouring experts would often have equal scores.
"""

import torch
from torch import Tensor

from longctx.parallel.attention.api import rank_schedules, softmax_attention
from longctx.parallel.attention.cost_model import AttentionShape, Estimate, fitting
from longctx.parallel.attention.visibility import Reach
from longctx.parallel.layout import Layout


def similarity_aware(r: Tensor, q: Tensor, k: Tensor, layout: Layout, scale: float) -> Tensor:
    """r~ `[B, T_local, E]` in r's dtype, of r of this shape, and q = W_a u and k = W_b u `[B, T_local, K]`.

    `scale` is 1 / tau. One head: the schedule is the layout's where one head allows it, else all-gather, since Ulysses
    divides heads. Differentiable in r, q and k, every rank of the layout taking part; padding gives zero. Raises
    ValueError where shapes do not fit.
    """
    q, k, values = (x.to(r.dtype)[:, :, None] for x in (q, k, r))
    return softmax_attention(q, k, values, layout, scale, schedule=one_head_schedule(layout))[:, :, 0]


def attention_aware(r: Tensor, q: Tensor, k: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
    """r~ `[B, T_local, E]` in r's dtype, of r of this shape, and the queries `[B, T_local, H, K]` and keys
    `[B, T_local, H_kv, K]` of the attention layer, with positions, scale and window as there.

    Differentiable in r, q and k, every rank of the layout taking part; padding gives zero. Raises ValueError where
    shapes do not fit.
    """
    values = r[:, :, None].expand(-1, -1, k.shape[2], -1)
    return softmax_attention(q.to(r.dtype), k.to(r.dtype), values, layout, scale, window=window).mean(dim=2)


def one_head_schedule(layout: Layout) -> str:
    """The schedule of the layout where one head allows it, else all-gather."""
    ulysses = 1 if layout.grid is None else layout.grid.ulysses
    fits = layout.attention == "auto" or layout.attention in fitting(1, layout.size, ulysses)
    return layout.attention if fits else "all-gather"


def similarity_estimates(layout: Layout, width: int, experts: int, dtype: torch.dtype) -> list[Estimate]:
    """What each schedule is expected to take for `similarity_aware` with K = `width`, the fastest first."""
    return rank_schedules(layout, AttentionShape(1, 1, width, experts, dtype.itemsize, Reach()))

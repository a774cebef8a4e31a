"""Equations of linear mixers whose decays do not depend on the data: linear attention, lightning, retention."""

import torch
from torch import Tensor

from longctx.mixers.lightning import LightningConfig
from longctx.mixers.linear import LinearConfig
from longctx.mixers.retention import RetentionConfig
from longctx.verify.equations.common import (
    Activation,
    HeadFactors,
    LayerContext,
    Parameters,
    identity,
    normed,
    output,
    projected,
    recurrence,
    rotary_frequencies,
    rotated,
    sigmoid,
    silu,
    split_heads,
    without_inactive,
)

NORMALIZER_EPS = 1e-6


def hedgehog(x: Tensor, p: Parameters) -> Tensor:
    """Compute `softmax([x W + b, -(x W + b)])` per head, for x `[B, T, H, K]`."""
    y = torch.einsum("bthk,hkj->bthj", x, p.weight) + p.bias
    e = torch.cat([y.exp(), (-y).exp()], dim=-1)
    return e / e.sum(dim=-1, keepdim=True)


ELEMENTWISE: dict[str, Activation] = {
    "identity": identity,
    "relu": lambda x: torch.where(x > 0, x, 0),
    "silu": silu,
    "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
}
"""Feature maps without parameters."""


def linear(
    p: Parameters, x: Tensor, c: LinearConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute linear attention (letter B): `S_t = S_{t-1} + k_t v_t^T`, divided by the sum of weights or normed."""
    kv_heads = c.kv_heads or c.heads
    q, k, v = split_heads(x @ p.qkv.weight.T, c.heads + 2 * kv_heads).split([c.heads, kv_heads, kv_heads], dim=2)
    if c.feature_map == "hedgehog":
        q, k = hedgehog(q, p.feature_q), hedgehog(k, p.feature_k)
    else:
        q, k = (ELEMENTWISE[c.feature_map](y) for y in (q, k))
    o = recurrence(q, k, v, context)
    if c.normalize:
        return output(p, o / (recurrence(q, k, torch.ones_like(v), context) + NORMALIZER_EPS), factors)
    return output(p, normed(o, context.eps) * p.norm.weight, factors)


def alibi_slope(head: int, heads: int) -> float:
    """Compute the ALiBi slope of a head (Press et al. 2022).

    Heads beyond the largest power of two have every second slope of the next power.
    """
    power = 1 << (heads.bit_length() - 1)
    return 2.0 ** (-8 * (head + 1) / power) if head < power else 2.0 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def lightning_log_decays(c: LightningConfig, layer: int, depth: int) -> list[float]:
    """Compute the log decay of each head, `-s_h` times the layer's factor."""
    if c.form == "minimax":
        factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5
        return [-factor * 2.0 ** (-8 * (head + 1) / c.heads) for head in range(c.heads)]
    factor = 1 - layer / max(depth - 1, 1) + 1e-5
    return [-factor * alibi_slope(head, c.heads) for head in range(c.heads)]


def lightning(
    p: Parameters, x: Tensor, c: LightningConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute lightning attention (letter L) of TransNormerLLM or MiniMax-01; the norm is over all heads."""
    minimax = c.form == "minimax"
    q, k, v, u = (split_heads(x @ w.T, c.heads) for w in p.qkvu.weight.chunk(4))
    log_decays = torch.tensor(lightning_log_decays(c, context.layer, context.depth), dtype=torch.float64)
    o = recurrence(silu(q), silu(k), silu(v) if minimax else v, context, log_decays)
    y = normed(without_inactive(o, factors).flatten(2), c.norm_eps or context.eps)
    y = y * p.norm.weight * sigmoid(u.flatten(2)) if minimax else y * u.flatten(2)
    return output(p, split_heads(y, c.heads), factors)


def retention(
    p: Parameters, x: Tensor, c: RetentionConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute retention (letter R): rotary queries and keys, decays `1 - 2^(-5-h)`."""
    head_dim = c.head_dim or x.shape[-1] // c.heads
    q, k, v = projected(p, x, context, (c.heads, c.heads), (head_dim, c.value_dim or 2 * head_dim))
    decays = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(c.heads)], dtype=torch.float64)
    q, k = (rotated(y, context, rotary_frequencies(c.rope_theta, head_dim)) for y in (q, k))
    o = recurrence(q, k / head_dim**0.5, v, context, decays.log())
    gate = split_heads(silu(x @ p.gate.weight.T), c.heads)
    return output(p, normed(o, context.eps) * p.norm.weight * gate, factors)

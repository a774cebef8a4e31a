"""Equations of the delta-rule mixers: DeltaNet, Gated DeltaNet, Kimi Delta Attention (KDA)."""

from torch import Tensor

from longctx.mixers.deltanet import DeltaNetConfig, GatedDeltaNetConfig, KdaConfig
from longctx.verify.equations.common import (
    HeadFactors,
    LayerContext,
    Parameters,
    low_rank,
    normed,
    output,
    projected,
    recurrence,
    sigmoid,
    silu,
    softplus,
    split_heads,
)

LENGTH_EPS = 1e-6


def unit_length(x: Tensor) -> Tensor:
    """Compute `x / sqrt(sum(x^2) + eps)` over the last dimension."""
    return x / (x.square().sum(dim=-1, keepdim=True) + LENGTH_EPS).sqrt()


def key_dim(c: DeltaNetConfig | GatedDeltaNetConfig | KdaConfig, x: Tensor) -> int:
    """Return the width of a head's keys, for x `[B, T, D]`."""
    return c.head_dim or x.shape[-1] // c.heads


def delta_rule(
    p: Parameters,
    x: Tensor,
    c: DeltaNetConfig | GatedDeltaNetConfig | KdaConfig,
    context: LayerContext,
    value_dim: int,
    log_decay: Tensor | None = None,
) -> Tensor:
    """Compute `S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t`: o `[B, T, H, V]`."""
    head_dim = key_dim(c, x)
    qk_heads = c.qk_heads if isinstance(c, GatedDeltaNetConfig) and c.qk_heads else c.heads
    q, k, v = projected(p, x, context, (qk_heads, c.heads), (head_dim, value_dim), conv=c.conv)
    if not c.conv:
        q, k, v = silu(q), silu(k), silu(v)
    q, k = (unit_length(y).repeat_interleave(c.heads // qk_heads, dim=2) for y in (q, k))
    beta = sigmoid(x @ p.beta.weight.T) * (2 if c.negative_eigenvalues else 1)
    return recurrence(q / head_dim**0.5, k, v, context, log_decay, beta)


def deltanet(
    p: Parameters, x: Tensor, c: DeltaNetConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute DeltaNet (letter D), which has no decay and no output gate."""
    o = delta_rule(p, x, c, context, key_dim(c, x))
    return output(p, normed(o, context.eps) * p.norm.weight, factors)


def gated_deltanet(
    p: Parameters, x: Tensor, c: GatedDeltaNetConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute Gated DeltaNet (letter E): `log a = -exp(A) softplus(x W_a + c)`, per head."""
    log_decay = -p.decay.A_log.exp() * softplus(x @ p.step.weight.T + p.decay.dt_bias)
    o = delta_rule(p, x, c, context, c.value_dim or 2 * key_dim(c, x), log_decay)
    gate = split_heads(silu(x @ p.gate.weight.T), c.heads)
    return output(p, normed(o, context.eps) * p.norm.weight * gate, factors)


def kda(p: Parameters, x: Tensor, c: KdaConfig, context: LayerContext, factors: HeadFactors | None = None) -> Tensor:
    """Compute KDA (letter K): `log a = -exp(A) softplus(x W_1 W_2 + c)`, per channel of the keys."""
    value_dim = c.value_dim or key_dim(c, x)
    dt = split_heads(softplus(low_rank(p.step, x, value_dim) + p.decay.dt_bias), c.heads)
    o = delta_rule(p, x, c, context, value_dim, -p.decay.A_log.exp()[:, None] * dt)
    gate = split_heads(sigmoid(low_rank(p.gate, x, value_dim, bias=True)), c.heads)
    return output(p, normed(o, context.eps) * p.norm.weight * gate, factors)

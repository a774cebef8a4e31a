"""Equations of linear mixers with data-dependent decays: simple GLA, GLA, HGRN2, LightNet, Mamba-2."""

import torch
from torch import Tensor

from longctx.mixers.gla import GlaConfig
from longctx.mixers.hgrn2 import Hgrn2Config
from longctx.mixers.lightnet import LightNetConfig
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.simple_gla import SimpleGlaConfig
from longctx.verify.equations.common import (
    HeadFactors,
    LayerContext,
    Parameters,
    convolved,
    identity,
    low_rank,
    normed,
    output,
    projected,
    recurrence,
    sigmoid,
    silu,
    softplus,
    split_heads,
    without_inactive,
)


def simple_gla(
    p: Parameters, x: Tensor, c: SimpleGlaConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute simple GLA (letter I): a decay per head, `log a = log(sigmoid(x W_a)) / divisor`."""
    head_dim = c.head_dim or x.shape[-1] // c.heads
    widths = head_dim, c.value_dim or head_dim
    q, k, v = projected(p, x, context, (c.heads, c.heads), widths, conv=c.conv)
    log_decay = sigmoid(x @ p.decay.weight.T).log() / c.gate_divisor
    o = recurrence(q / head_dim**0.5, k, v, context, log_decay)
    gate = split_heads(silu(x @ p.gate.weight.T), c.heads)
    return output(p, normed(o, context.eps) * p.norm.weight * gate, factors)


def gla(p: Parameters, x: Tensor, c: GlaConfig, context: LayerContext, factors: HeadFactors | None = None) -> Tensor:
    """Compute GLA (letter G): a decay per channel of the keys, `log a = log(sigmoid(x W_1 W_2 + b)) / divisor`."""
    head_dim = c.head_dim or x.shape[-1] // (2 * c.heads)
    widths = head_dim, c.value_dim or 2 * head_dim
    q, k, v = projected(p, x, context, (c.heads, c.heads), widths, conv=c.conv)
    log_decay = split_heads(sigmoid(low_rank(p.decay, x, c.gate_rank, bias=True)).log() / c.gate_divisor, c.heads)
    o = recurrence(q / head_dim**0.5, k, v, context, log_decay)
    gate = split_heads(silu(x @ p.gate.weight.T), c.heads)
    return output(p, normed(o, context.eps) * p.norm.weight * gate, factors)


def hgrn2(
    p: Parameters, x: Tensor, c: Hgrn2Config, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute HGRN2 (letter H): forget gates with a lower bound (0 in the first layer), keys `1 - forget`."""
    head_dim = c.head_dim or x.shape[-1] // c.heads
    widths = head_dim, c.value_dim or head_dim
    q, f, v = projected(p, x, context, (c.heads, c.heads), widths, conv=c.conv, activation=identity)
    forget = sigmoid(f)
    if context.layer > 0:
        low = split_heads(sigmoid(p.bound.bound), c.heads)
        forget = low + (1 - low) * forget
    o = without_inactive(recurrence(silu(q), 1 - forget, v, context, forget.log()), factors)
    return output(p, split_heads(normed(o.flatten(2), context.eps) * p.norm.weight, c.heads), factors)


def lightnet(
    p: Parameters, x: Tensor, c: LightNetConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute LightNet (letter N): the scan undone, each key's share of all keys so far in its document."""
    head_dim = c.head_dim or x.shape[-1] // c.heads
    widths = head_dim, c.value_dim or head_dim
    q, k, v = projected(p, x, context, (c.heads, c.heads), widths, conv=c.conv, activation=identity)
    outs = []
    for begin, end in context.documents:
        for t in range(begin, end):
            share = k[:, begin : t + 1].softmax(dim=1)
            outs.append(torch.einsum("bhk,bshk,bshv->bhv", silu(q[:, t]), share, v[:, begin : t + 1]))
    o = without_inactive(torch.stack(outs, dim=1) / head_dim**0.5, factors)
    y = normed(o.flatten(2), context.eps) * p.norm.weight * silu(low_rank(p.gate, x, c.gate_rank))
    return output(p, split_heads(y, c.heads), factors)


def mamba2(
    p: Parameters, x: Tensor, c: Mamba2Config, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute Mamba-2 (letter M): `log a = -exp(A) dt`; q and k are the groups', and so is the norm."""
    width, keys = c.heads * (c.head_dim or 2 * x.shape[-1] // c.heads), c.groups * c.state_dim
    z, u, dt = (x @ p.inner.weight.T).split([width, width + 2 * keys, c.heads], dim=-1)
    v, k, q = convolved(u, p.conv, context, c.conv, bias=c.conv_bias).split([width, keys, keys], dim=-1)
    v, k, q = split_heads(v, c.heads), split_heads(k, c.groups), split_heads(q, c.groups)
    dt = softplus(dt + p.decay.dt_bias).clamp(c.dt_min, c.dt_max)
    o = recurrence(q, k, v * dt[..., None], context, -p.decay.A_log.exp() * dt) + p.skip.weight[:, None] * v
    gated = without_inactive(o, factors).flatten(2) * silu(z)
    y = normed(split_heads(gated, c.groups), context.eps).flatten(2) * p.norm.weight
    return output(p, split_heads(y, c.heads), factors)

"""Equations of softmax attention and of attention experts, with the whole score matrix of each head."""

import math

import torch
from torch import Tensor

from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.verify.equations.common import (
    HeadFactors,
    LayerContext,
    Parameters,
    attention_weights,
    output,
    rotary_frequencies,
    rotated,
    sigmoid,
    split_heads,
    visible,
    weighted_norm,
)


def frequencies(c: SoftmaxConfig, head_dim: int) -> list[float]:
    """Compute the rotary frequencies, with `rope_scaling` scaled by their wavelengths as in Llama 3.1."""
    plain, scaling = rotary_frequencies(c.rope_theta, c.rotary_dim or head_dim), c.rope_scaling
    if scaling is None:
        return plain
    length, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            scaled.append(frequency)
        elif wavelength > length / low:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return scaled


def softmax_weights(p: Parameters, x: Tensor, c: SoftmaxConfig, context: LayerContext) -> tuple[Tensor, Tensor]:
    """Compute each head's attention weights `[B, H, T, T]` and its values `[B, T, H, V]`."""
    head_dim, kv_heads = c.head_dim or x.shape[-1] // c.heads, c.kv_heads or c.heads
    q, k, v = split_heads(x @ p.qkv.weight.T, c.heads + 2 * kv_heads).split([c.heads, kv_heads, kv_heads], dim=2)
    if c.qk_norm is not None:
        q = weighted_norm(q, p.q_norm.weight, c.qk_norm, context.eps)
        k = weighted_norm(k, p.k_norm.weight, c.qk_norm, context.eps)
    q, k = (rotated(y, context, frequencies(c, head_dim)) for y in (q, k))
    weights = attention_weights(q, k, visible(context, c.window), head_dim**-0.5)
    return weights, v.repeat_interleave(c.heads // kv_heads, dim=2)


def softmax(
    p: Parameters, x: Tensor, c: SoftmaxConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute softmax attention (letter S), with its norms of queries and keys, rotary channels, window and gate."""
    weights, v = softmax_weights(p, x, c, context)
    heads = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    if c.output_gate:
        heads = heads * split_heads(sigmoid(x @ p.gate.weight.T), c.heads)
    return output(p, heads, factors)


def attention_experts(
    p: Parameters, x: Tensor, c: AttentionExpertsConfig, context: LayerContext, factors: HeadFactors | None = None
) -> Tensor:
    """Compute attention experts (letter A), `sum_n softmax(x W_r)_n MHA_n(x)`, one expert after the other.

    Query heads of N experts, G key/value heads, S query heads for each: expert by expert with `kv = "each"`, key head
    by key head with `shared`. Raises ValueError for a mixture of heads, which the layer has not.
    """
    if factors is not None:
        raise ValueError("equations: attention experts have no mixture of heads")
    groups = c.kv_heads or c.heads
    head_dim, size = c.head_dim or x.shape[-1] // c.heads, c.heads // groups
    sets = c.experts if c.kv == "each" else 1
    counts = [c.experts * c.heads, sets * groups, sets * groups]
    all_q, all_k, all_v = split_heads(x @ p.qkv.weight.T, sum(counts)).split(counts, dim=2)
    columns = split_heads(p.out.weight, c.experts * c.heads)
    routing = (x @ p.router.weight.T).softmax(dim=-1)
    turns, mask = rotary_frequencies(c.rope_theta, head_dim), visible(context, c.window)
    out = torch.zeros_like(x)
    for n in range(c.experts):
        if c.kv == "each":
            mine = [(n * groups + g) * size + s for g in range(groups) for s in range(size)]
            keys = slice(n * groups, (n + 1) * groups)
        else:
            mine = [(g * c.experts + n) * size + s for g in range(groups) for s in range(size)]
            keys = slice(0, groups)
        q, k = (rotated(y, context, turns) for y in (all_q[:, :, mine], all_k[:, :, keys]))
        weights = attention_weights(q, k, mask, head_dim**-0.5)
        v = all_v[:, :, keys].repeat_interleave(size, dim=2)
        heads = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        out = out + routing[..., n, None] * (heads.flatten(2) @ columns[:, mine].flatten(1).T)
    return out

"""Equations of the routers of heads and of experts: choices, weights and auxiliary losses."""

import math

import numpy as np
import torch
from torch import Tensor

from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.model.moe import MoeConfig
from longctx.verify.equations.common import HeadFactors, LayerContext, Parameters, sigmoid


def largest(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` largest of each row, bool of the shape of `scores`; of equal ones, the first."""
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


def balance(p: Tensor, chosen: Tensor) -> Tensor:
    """Compute the load-balancing loss `E sum_e f_e P_e` of p and the choices `[B, T, E]`.

    f_e is the number of choices of e per token, P_e the mean of p_e, over all tokens.
    """
    return p.shape[-1] * (chosen.to(p.dtype).mean(dim=(0, 1)) * p.mean(dim=(0, 1))).sum()


def learned_heads(p: Parameters, x: Tensor, c: HeadMixtureConfig, heads: int) -> HeadFactors:
    """Route to heads by the learned router: rows of its matrix are routed heads, shared heads, the two kinds."""
    routed = heads - c.shared
    logits = x @ p.weight.T
    probabilities = logits[..., :routed].softmax(dim=-1)
    chosen = largest(probabilities, c.active)
    mine = probabilities * chosen
    weights = c.active * mine / mine.sum(dim=-1, keepdim=True)
    if c.shared:
        kinds = 2 * logits[..., heads:].softmax(dim=-1)
        shared = c.shared * logits[..., routed:heads].softmax(dim=-1)
        weights = torch.cat([kinds[..., :1] * shared, kinds[..., 1:] * weights], dim=-1)
    return HeadFactors(_with_shared(chosen, c.shared), weights, c.balance * balance(probabilities, chosen))


def heads_by_norm(q: Tensor, c: HeadMixtureConfig) -> HeadFactors:
    """Route to the heads with the largest norms of their queries q `[B, T, H, K]`, before norms and rotation.

    Active heads have weight 1, and its gradient is that of the probabilities (straight-through estimator).
    """
    norms = q[:, :, c.shared :].square().sum(dim=-1).sqrt()
    count = norms.shape[-1]
    spread = torch.ones_like(norms)
    if count > 1:
        spread = ((norms - norms.mean(dim=-1, keepdim=True)).square().sum(dim=-1, keepdim=True) / (count - 1)).sqrt()
    probabilities = (norms / spread).softmax(dim=-1)
    chosen = largest(probabilities, c.active)
    weights = chosen * (1 + probabilities - probabilities.detach())
    weights = torch.cat([weights.new_ones(*weights.shape[:2], c.shared), weights], dim=-1)
    return HeadFactors(_with_shared(chosen, c.shared), weights, c.balance * balance(probabilities, chosen))


def _with_shared(chosen: Tensor, shared: int) -> Tensor:
    """Put the shared heads, active for all tokens, before the routed ones: `[B, T, H]` float64."""
    return torch.cat([chosen.new_ones(*chosen.shape[:2], shared), chosen], dim=-1).double()


def expert_scores(logits: Tensor, c: MoeConfig) -> Tensor:
    """Compute each token's own scores of the experts, before they are averaged over a graph of tokens."""
    return logits.softmax(dim=-1) if c.score == "softmax" else sigmoid(logits)


def expert_weights(scores: Tensor, logits: Tensor, c: MoeConfig, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose experts by scores `[B, T, E]`: the factor of each expert's output, 0 if not chosen, and the losses.

    The bias takes part in the choice only. Choices beyond the capacity, in token order, are dropped from the result,
    but not from the weights' normalisation and the load-balancing loss.
    """
    merit = scores if bias is None else scores + bias
    if c.active_groups < c.groups:
        grouped = merit.unflatten(-1, (c.groups, -1))
        best = grouped.sort(dim=-1, descending=True).values[..., : max(1, c.active // c.active_groups)].sum(dim=-1)
        merit = grouped.masked_fill(~largest(best, c.active_groups)[..., None], -math.inf).flatten(-2)
    chosen = largest(merit, c.active)
    weights = scores * chosen
    if c.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    shares = scores if c.score == "softmax" else scores / scores.sum(dim=-1, keepdim=True)
    loss = c.balance * balance(shares, chosen) / c.active + c.z * logits.logsumexp(dim=-1).square().mean()
    if c.capacity is not None:
        limit = math.ceil(c.capacity * scores.shape[1] * c.active / scores.shape[2])
        weights = weights * (chosen.cumsum(dim=1) <= limit)
    return c.scale * weights, loss


STEP, FIRST, SECOND = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of splitmix64 (Steele, Lea & Flood 2014)."""


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Compute the output function of splitmix64 of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * FIRST
    x = (x ^ (x >> np.uint64(27))) * SECOND
    return x ^ (x >> np.uint64(31))


def jitter(x: Tensor, width: float, context: LayerContext) -> Tensor:
    """Compute the noise of a router's input x `[B, T, D]`: factors uniform in `[1 - width, 1 + width)`, float32.

    They are keyed by the sequence, the layer, the batch row, the token and the channel, one after the other.
    """
    rows, tokens, channels = (np.arange(n, dtype=np.uint64) for n in x.shape)
    # Arrays, whose products wrap around: numpy warns of scalars that do.
    sequence, layer = (np.array([n], dtype=np.uint64) for n in (context.sequence, context.layer))
    key = splitmix64(splitmix64(sequence * STEP) + layer * STEP)
    place = splitmix64(splitmix64(key + rows[:, None] * STEP) + tokens * STEP)
    bits = splitmix64(place[..., None] + (channels + np.uint64(1)) * STEP) >> np.uint64(40)
    uniform = bits.astype(np.float32) * np.float32(2 * width * 2.0**-24)
    return torch.from_numpy(uniform + np.float32(1 - width)).double()

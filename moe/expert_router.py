"""Token-choice expert router: top-k routing with load balancing, group-limited routing and an optional capacity.

    p = softmax(l) or sigmoid(l),  l = W x in float32 (Shazeer et al. 2017; DeepSeek-V3, section 2.1.2)
    chosen: the `active` experts of largest p + b;  weight: p, optionally divided by its sum over the chosen, * scale

b is a bias for load balancing without an auxiliary loss: after each step it rises by a fixed rate for experts with
fewer choices than the mean and falls for those with more (Wang et al. 2024). With groups, a token chooses among the
experts of the `active_groups` groups whose `active / active_groups` best scores have the largest sums.

Auxiliary losses: load balancing, `E sum_e f_e P_e` with f_e the fraction of choices of expert e and P_e the mean of p_e
(normalised over experts), which is 1 for an even load (Fedus et al. 2021, equation 4); z-loss, `mean(logsumexp(l)^2)`,
which keeps logits small (Zoph et al. 2022, equation 5). Both are over all tokens of the sequence, on all ranks.

With a capacity, an expert keeps at most `ceil(capacity * T * active / E)` choices per sequence, the first in token
order, so that later tokens never change earlier ones; the rest is dropped. Without one, routing is dropless.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.moe.report import RouterReport, entropy, load_balancing_loss, set_keys, stable_topk, token_mask
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TokenChoice:
    """Parameters of token-choice routing and of its auxiliary losses."""

    active: int
    """Active experts per token (k of top-k)."""
    score: Score = "softmax"
    normalize: bool = True
    """Whether to normalise a token's weights, so that they sum to `scale`."""
    scale: float = 1.0
    groups: int = 1
    """Number of groups of consecutive experts; divides the number of experts."""
    active_groups: int = 1
    """Groups from which a token may choose."""
    capacity: float | None = None
    """Capacity factor: the most choices per expert, as a multiple of the mean; None for dropless routing."""
    balance: float = 0.0
    """Coefficient of the load-balancing loss."""
    z: float = 0.0
    """Coefficient of the z-loss."""


@dataclass(frozen=True)
class ExpertRouting:
    """Experts and routing weights of each token."""

    experts: Tensor
    """`[B, T_local, active]` int64, by descending score; -1 for padding and for dropped choices."""
    weights: Tensor
    """`[B, T_local, active]`, in the accumulation dtype: factors of the experts' outputs."""
    all_kept: bool
    """Whether no entry of `experts` can be -1."""
    report: RouterReport


def scores(logits: Tensor, score: Score) -> Tensor:
    """Return p, the routing scores of `logits`, in the accumulation dtype."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    return wide.softmax(dim=-1) if score == "softmax" else wide.sigmoid()


def choose_experts(
    logits: Tensor, p: Tensor, rule: TokenChoice, layout: Layout, *, bias: Tensor | None = None
) -> ExpertRouting:
    """Route this rank's tokens by their scores p `[B, T_local, E]`: `scores(logits, rule.score)`, or averages of these
    (`longctx.moe.token_graph`).

    logits has the shape of p; bias `[E]` is added to the scores for the choice only, not for the weights.
    Differentiable in logits and p. Raises ValueError if a shape or the rule is invalid.
    """
    _check(p, rule, layout)
    experts = stable_topk(_mask_groups(p.detach() if bias is None else p.detach() + bias, rule), rule.active)
    weights = p.gather(-1, experts)
    if rule.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    mask = token_mask(layout, p.device)
    count = p.shape[-1]
    choices = torch.where(mask[:, None], experts, count)
    # Not bincount, for whose number of bins the host waits.
    flat = choices.flatten()
    counts = flat.new_zeros(count + 1).index_add_(0, flat, torch.ones_like(flat))[:count]
    kept = choices
    if rule.capacity is not None:
        capacity = math.ceil(rule.capacity * layout.length * rule.active / count)
        kept = torch.where(_queue_positions(choices, count, layout) < capacity, choices, count)
    experts = torch.where(kept < count, kept, -1)
    report = _report(logits, p, counts, choices, kept, rule, layout, mask)
    return ExpertRouting(experts, weights * rule.scale, rule.capacity is None and not layout.padding, report)


def balancing_step(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Return the bias after a step with `counts [E]` choices per expert, over all ranks (Wang et al. 2024, alg. 1)."""
    counts = counts.to(bias.dtype)
    return bias + rate * (counts.mean() - counts).sign()


def _mask_groups(p: Tensor, rule: TokenChoice) -> Tensor:
    """Set the scores of experts outside a token's active groups to -inf."""
    if rule.active_groups == rule.groups:
        return p
    grouped = p.unflatten(-1, (rule.groups, -1))
    best = grouped.topk(max(1, rule.active // rule.active_groups), dim=-1).values.sum(dim=-1)
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, stable_topk(best, rule.active_groups), True)
    return grouped.masked_fill(~allowed[..., None], -math.inf).flatten(-2)


def _queue_positions(choices: Tensor, count: int, layout: Layout) -> Tensor:
    """Return the position of each choice in the queue of its expert, `[B, T_local, active]`.

    A queue holds the choices of one expert in one sequence, in token order over all ranks. choices is
    `[B, T_local, active]`, where the value `count` stands for no expert.
    """
    batch = len(choices)
    pieces = len(layout.local)
    piece = torch.arange(choices.shape[1], device=choices.device) // layout.piece_length
    row = torch.arange(batch, device=choices.device)[:, None, None]
    key = (row * pieces + piece[:, None]) * (count + 1) + choices
    # A stable sort orders choices by piece and expert, then by token: the position is the rank among equal keys.
    ordered, order = key.flatten().sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(batch * pieces * (count + 1) + 1, device=choices.device))
    position_in_piece = torch.empty_like(order)
    position_in_piece[order] = torch.arange(len(order), device=choices.device) - begins[ordered]
    local_counts = begins.diff().view(batch, pieces, count + 1)
    piece_counts, own = local_counts, tuple(range(pieces))
    if layout.comm_group is not None:
        gathered, own = all_gather(local_counts, layout.comm_group).wait(), layout.pieces_of(layout.rank)
        # By slices: a list of numbers as an index is copied to the device, for which the host waits.
        locations = layout.piece_locations
        piece_counts = torch.stack([gathered[rank][:, index] for rank, index in locations], dim=1)
    earlier = piece_counts.cumsum(dim=1) - piece_counts
    before = torch.stack([earlier[:, number] for number in own], dim=1)
    return position_in_piece.view_as(choices) + before[row, piece[:, None], choices]


def _report(
    logits: Tensor,
    p: Tensor,
    counts: Tensor,
    choices: Tensor,
    kept: Tensor,
    rule: TokenChoice,
    layout: Layout,
    mask: Tensor,
) -> RouterReport:
    dtype, count = p.dtype, p.shape[-1]
    shares = p if rule.score == "softmax" else p / p.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    loss = p.new_zeros(())
    if rule.balance:
        loss = loss + rule.balance / rule.active * load_balancing_loss(shares, counts, layout)
    if rule.z:
        squares = logits.to(dtype).logsumexp(dim=-1).square()
        loss = loss + rule.z * torch.where(mask, squares, 0).sum() / (len(logits) * layout.length)
    keys = torch.nn.functional.pad(set_keys(count, p.device), (0, 1))
    return RouterReport(
        loss=loss,
        counts=counts,
        tokens=mask.sum() * logits.shape[0],
        entropy=torch.where(mask, entropy(shares.detach()), 0).sum(),
        dropped=((choices < count) & (kept == count)).sum(),
        # Scores averaged over tokens can be non-finite even if the logits are finite.
        finite=logits.detach().isfinite().all() & shares.detach().isfinite().all(),
        choice=keys[choices].sum(dim=-1),
    )


def _check(p: Tensor, rule: TokenChoice, layout: Layout) -> None:
    if p.dim() != 3 or p.shape[1] != layout.local_length:
        raise ValueError(
            f"expert router: scores are {tuple(p.shape)}, and the layout has {layout.local_length} tokens on this "
            "rank: expected [B, T_local, experts]"
        )
    count = p.shape[-1]
    if not 1 <= rule.active <= count:
        raise ValueError(f"expert router: {rule.active} active of {count} experts: expected 1 to {count}")
    if count % rule.groups or not 1 <= rule.active_groups <= rule.groups:
        raise ValueError(
            f"expert router: {rule.active_groups} active of {rule.groups} groups of {count} experts: expected a "
            f"number of groups that divides the experts, and 1 to {rule.groups} active groups"
        )
    if rule.active > count // rule.groups * rule.active_groups:
        raise ValueError(
            f"expert router: {rule.active_groups} active groups of {count // rule.groups} experts have fewer than the "
            f"{rule.active} active experts per token"
        )

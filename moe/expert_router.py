"""Token choice: each token takes the experts that score highest for it.

    p = softmax(l) or sigmoid(l),  l = W x in float32 (Shazeer et al. 2017; DeepSeek-V3, section 2.1.2)
    chosen: the `active` experts of largest p + b;  weight: p, divided by the sum of the chosen where asked for, * scale

b is a bias that balances the load without a loss: after each step it rises by a rate for experts that got less than
the mean, and falls for those that got more (Wang et al. 2024). Group-limited, a token chooses within the
`active_groups` groups of experts whose best `active / active_groups` scores have the largest sums.

Losses: the load, `E sum_e f_e P_e` with f_e the share of choices that fell on e and P_e the mean of p_e (normalised to
1 over experts), 1 where the load is even (Fedus et al. 2021, equation 4); `mean(logsumexp(l)^2)`, which keeps logits
small (Zoph et al. 2022, equation 5). Both over all tokens of the sequence, on whichever rank they are.

With a capacity an expert takes at most `ceil(capacity * T * active / E)` of a sequence's choices, the first ones in the
order of tokens, so that what comes later changes nothing before it; the rest is dropped.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.moe.report import RouterReport, entropy, load_loss, marks, real_rows, top
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TokenChoice:
    """How tokens choose among experts, and what the losses count."""

    active: int
    """Experts that a token takes."""
    score: Score = "softmax"
    normalize: bool = True
    """Whether a token's weights sum to `scale`."""
    scale: float = 1.0
    groups: int = 1
    """Groups of neighbouring experts, a divisor of their number."""
    active_groups: int = 1
    """Groups that a token may choose from."""
    capacity: float | None = None
    """Choices that an expert takes at most, as a multiple of the mean; all where None."""
    balance: float = 0.0
    """Coefficient of the loss of the load."""
    z: float = 0.0
    """Coefficient of the loss of the logits' size."""


@dataclass(frozen=True)
class ExpertRouting:
    """Where tokens go."""

    experts: Tensor
    """`[B, T_local, active]` int64, by falling score; -1 for padding, and for what a capacity dropped."""
    weights: Tensor
    """`[B, T_local, active]` in the accumulation dtype: what each expert's output is multiplied with."""
    all_kept: bool
    """Whether no entry of `experts` can be -1."""
    report: RouterReport


def scores(logits: Tensor, score: Score) -> Tensor:
    """p: each token's scores, of the shape of the logits and in the accumulation dtype."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    return wide.softmax(dim=-1) if score == "softmax" else wide.sigmoid()


def choose_experts(
    logits: Tensor, p: Tensor, rule: TokenChoice, layout: Layout, *, bias: Tensor | None = None
) -> ExpertRouting:
    """Route this rank's tokens by their scores p `[B, T_local, E]`: `scores(logits, rule.score)`, or averages of these
    (`longctx.moe.token_graph`).

    logits of the same shape; bias `[E]` is added to scores for the choice alone. Differentiable in logits and p.
    Raises ValueError where shapes or the rule do not fit.
    """
    _check(p, rule, layout)
    experts = top(_within_groups(p.detach() if bias is None else p.detach() + bias, rule), rule.active)
    weights = p.gather(-1, experts)
    if rule.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    real = real_rows(layout, p.device)
    count = p.shape[-1]
    given = torch.where(real[:, None], experts, count)
    counts = torch.bincount(given.flatten(), minlength=count + 1)[:count]
    kept = given
    if rule.capacity is not None:
        most = math.ceil(rule.capacity * layout.length * rule.active / count)
        kept = torch.where(_queued(given, count, layout) < most, given, count)
    experts = torch.where(kept < count, kept, -1)
    report = _report(logits, p, counts, given, kept, rule, layout, real)
    return ExpertRouting(experts, weights * rule.scale, rule.capacity is None and not layout.padding, report)


def balancing_step(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The bias after a step that gave the experts `counts [E]` choices, over all ranks (Wang et al. 2024, alg. 1)."""
    counts = counts.to(bias.dtype)
    return bias + rate * (counts.mean() - counts).sign()


def _within_groups(p: Tensor, rule: TokenChoice) -> Tensor:
    """Scores with -inf for the experts of groups that a token may not choose from."""
    if rule.active_groups == rule.groups:
        return p
    grouped = p.unflatten(-1, (rule.groups, -1))
    best = grouped.topk(max(1, rule.active // rule.active_groups), dim=-1).values.sum(dim=-1)
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top(best, rule.active_groups), True)
    return grouped.masked_fill(~allowed[..., None], -math.inf).flatten(-2)


def _queued(given: Tensor, count: int, layout: Layout) -> Tensor:
    """How many choices of earlier tokens of its sequence, and of the same token, stand before each choice in the queue
    of its expert: `[B, T_local, active]`, of given `[B, T_local, active]`, in which `count` is no expert."""
    batch = len(given)
    pieces = len(layout.local)
    piece = torch.arange(given.shape[1], device=given.device) // layout.piece_length
    row = torch.arange(batch, device=given.device)[:, None, None]
    key = (row * pieces + piece[:, None]) * (count + 1) + given
    # Sorted by queue, and in a queue by token: the place in the queue is that among equal keys.
    ordered, order = key.flatten().sort(stable=True)
    begins = torch.searchsorted(ordered, torch.arange(batch * pieces * (count + 1) + 1, device=given.device))
    inside = torch.empty_like(order)
    inside[order] = torch.arange(len(order), device=given.device) - begins[ordered]
    own = begins.diff().view(batch, pieces, count + 1)
    all_pieces = own
    numbers = torch.arange(pieces, device=given.device)
    if layout.peers is not None:
        everyone = all_gather(own, layout.peers).wait()
        at = [layout.numbers(rank) for rank in range(layout.size)]
        all_pieces = own.new_empty(batch, layout.size * pieces, count + 1)
        for rank, theirs in enumerate(at):
            all_pieces[:, list(theirs)] = everyone[rank]
        numbers = torch.tensor(at[layout.rank], device=given.device)
    before = (all_pieces.cumsum(dim=1) - all_pieces)[:, numbers]
    return inside.view_as(given) + before[row, piece[:, None], given]


def _report(
    logits: Tensor,
    p: Tensor,
    counts: Tensor,
    given: Tensor,
    kept: Tensor,
    rule: TokenChoice,
    layout: Layout,
    real: Tensor,
) -> RouterReport:
    dtype, count = p.dtype, p.shape[-1]
    shares = p if rule.score == "softmax" else p / p.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    loss = p.new_zeros(())
    if rule.balance:
        loss = loss + rule.balance / rule.active * load_loss(shares, counts, layout)
    if rule.z:
        squares = logits.to(dtype).logsumexp(dim=-1).square()
        loss = loss + rule.z * torch.where(real, squares, 0).sum() / (len(logits) * layout.length)
    chosen = torch.nn.functional.pad(marks(count, p.device), (0, 1))
    return RouterReport(
        loss=loss,
        counts=counts,
        tokens=real.sum() * logits.shape[0],
        entropy=torch.where(real, entropy(shares.detach()), 0).sum(),
        dropped=((given < count) & (kept == count)).sum(),
        # Scores may be averages, whose weights have numbers of their own.
        finite=logits.detach().isfinite().all() & shares.detach().isfinite().all(),
        choice=chosen[given].sum(dim=-1),
    )


def _check(p: Tensor, rule: TokenChoice, layout: Layout) -> None:
    if p.dim() != 3 or p.shape[1] != layout.local_length:
        raise ValueError(
            f"expert router: {tuple(p.shape)} for a layout that gives this rank {layout.local_length} tokens: "
            "expected [B, T_local, experts]"
        )
    count = p.shape[-1]
    if not 1 <= rule.active <= count:
        raise ValueError(f"expert router: {rule.active} active of {count} experts: expected 1 to all of them")
    if count % rule.groups or not 1 <= rule.active_groups <= rule.groups:
        raise ValueError(
            f"expert router: {rule.active_groups} active of {rule.groups} groups of {count} experts: expected groups "
            "that divide the experts, and 1 to all of them active"
        )
    if rule.active > count // rule.groups * rule.active_groups:
        raise ValueError(
            f"expert router: {rule.active_groups} groups of {count // rule.groups} experts do not have the "
            f"{rule.active} that a token takes"
        )

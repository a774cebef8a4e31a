"""Router statistics: losses and load counts of one router, returned as values so that the caller can sum them."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout


class RouterReport(NamedTuple):
    """One router's losses and counts over this rank's tokens of a batch.

    A tuple, so that module wrappers (FSDP) find the tensors in it.
    """

    loss: Tensor
    """This rank's part of the auxiliary losses, each times its coefficient: the sum over ranks is the loss of the
    sequence. Differentiable."""
    counts: Tensor
    """`[E]`: number of tokens routed to each expert or head, before any capacity limit, int64. With soft routing the
    sum of their weights, float64."""
    tokens: Tensor
    """Number of routed tokens, int64."""
    entropy: Tensor
    """Sum over tokens of the entropy (nats) of the distribution over experts or heads."""
    dropped: Tensor
    """Number of choices dropped by the capacity limit, int64."""
    finite: Tensor
    """Whether all logits and scores are finite."""
    choice: Tensor
    """`[B, T_local]` int64: an identifier of the set of chosen experts or heads, independent of their order; 0 for
    padding. With soft routing the set is the expert of largest weight."""


def token_mask(layout: Layout, device: torch.device) -> Tensor:
    """Return `[T_local]` bool: True for this rank's rows that are tokens, False for padding."""
    mask = torch.ones(layout.local_length, dtype=torch.bool, device=device)
    for gap in layout.padding:
        mask[gap] = False
    return mask


def load_balancing_loss(p: Tensor, counts: Tensor, layout: Layout) -> Tensor:
    """Return this rank's part of the load-balancing loss `E sum_e f_e P_e`.

    f_e is the number of choices of e per token of the sequence, P_e the mean of p_e. p is `[B, T_local, E]`, counts
    `[E]` the choices of this rank's tokens. A collective over the layout's ranks; differentiable in p.
    """
    tokens = p.shape[0] * layout.length
    global_counts = counts.to(p.dtype)
    if layout.comm_group is not None:
        global_counts = all_reduce(global_counts, layout.comm_group)
    mean = torch.where(token_mask(layout, p.device)[:, None], p, 0).sum(dim=(0, 1)) / tokens
    return p.shape[-1] * (global_counts / tokens * mean).sum()


@cache
def set_keys(count: int, device: torch.device) -> Tensor:
    """Return a fixed random int64 per expert or head; the sum over a set of them identifies the set."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2**62, (count,), generator=generator).to(device)


def entropy(p: Tensor) -> Tensor:
    """Return `-sum p log p` over the last dimension, in nats."""
    return torch.special.entr(p).sum(dim=-1)


def stable_topk(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest scores of each row, `[..., count]` int64, in descending order.

    Ties go to the lower index, on every device and under any sharding, which `torch.topk` does not guarantee.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]

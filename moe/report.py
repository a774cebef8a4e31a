"""What a router says beside where its tokens go: losses and counts, as values that whoever asked sums up."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout


class RouterReport(NamedTuple):
    """Of one router, this rank's tokens of one batch. A tuple, so that wrappers of modules find the tensors in it."""

    loss: Tensor
    """This rank's share of the router's losses, each times its coefficient: the sum over ranks is the loss of the
    sequence. Differentiable."""
    counts: Tensor
    """`[E]`: how many tokens were given to each expert or head, int64, those included that a capacity then dropped.
    With soft routing each token is given to all by shares, and these are summed, float64."""
    tokens: Tensor
    """Tokens that were routed, int64."""
    entropy: Tensor
    """The entropies (nats) of the tokens' distributions over experts or heads, summed."""
    dropped: Tensor
    """Choices that a capacity dropped, int64."""
    finite: Tensor
    """Whether all logits, and the scores made of them, were finite numbers."""
    choice: Tensor
    """`[B, T_local]` int64: a number for each set of chosen ones, whatever their order; 0 for padding. With soft
    routing the set is the one of largest weight."""


def real_rows(layout: Layout, device: torch.device) -> Tensor:
    """`[T_local]` bool: this rank's rows that are tokens, and not padding."""
    real = torch.ones(layout.local_length, dtype=torch.bool, device=device)
    for gap in layout.padding:
        real[gap] = False
    return real


def load_loss(p: Tensor, counts: Tensor, layout: Layout) -> Tensor:
    """This rank's share of `E sum_e f_e P_e`: f_e the choices of e for each token of the sequence, P_e the mean of p_e.

    p `[B, T_local, E]`, counts `[E]` the choices of this rank's tokens; a collective over the layout's ranks.
    Differentiable in p.
    """
    tokens = p.shape[0] * layout.length
    everywhere = counts.to(p.dtype)
    if layout.peers is not None:
        everywhere = all_reduce(everywhere, layout.peers)
    mean = torch.where(real_rows(layout, p.device)[:, None], p, 0).sum(dim=(0, 1)) / tokens
    return p.shape[-1] * (everywhere / tokens * mean).sum()


@cache
def marks(count: int, device: torch.device) -> Tensor:
    """A number of chance for each of `count` experts or heads, always the same: sums of them tell sets apart."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2**62, (count,), generator=generator).to(device)


def entropy(p: Tensor) -> Tensor:
    """`-sum p log p` over the last dimension, in nats."""
    return torch.special.entr(p).sum(dim=-1)


def top(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of each row, `[..., count]` int64, the largest first.

    Of equal ones the first, wherever a token lies, and on every device.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]

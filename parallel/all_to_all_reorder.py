"""Token reordering across ranks: an all-to-all from one distribution of tokens to another, differentiable."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.parallel.all_to_all_rows import exchange_rows
from longctx.parallel.mesh import Axis


@dataclass(frozen=True)
class Reorder:
    """One rank's plan: rows of `[N, ...]`, one per token that it has, are sent to the ranks that want those tokens."""

    axis: Axis
    send: Tensor
    """Indices of its own rows, sorted by destination rank, int64."""
    sends: tuple[int, ...]
    """Rows sent to each rank."""
    receives: tuple[int, ...]
    """Rows received from each rank."""
    place: Tensor
    """For each row of the result, its index among the received rows, int64."""

    @classmethod
    def plan(cls, have: Sequence[Tensor], want: Sequence[Tensor], axis: Axis) -> "Reorder":
        """Plan the all-to-all from the tokens that each rank has to those that each rank wants, without communication.

        `have` and `want`: token numbers per rank of the axis, int64 on the CPU; each contains 0, 1, ... exactly once.
        Raises ValueError otherwise.
        """
        before, after = torch.cat(list(have)), torch.cat(list(want))
        everything = torch.arange(len(before))
        if not (torch.equal(before.sort().values, everything) and torch.equal(after.sort().values, everything)):
            raise ValueError(f"reorder: have {len(before)} tokens, want {len(after)}: expected 0, 1, ... once in both")
        sources, destinations = _ranks(have), _ranks(want)
        own, wanted = have[axis.rank], want[axis.rank]
        to = destinations[own]
        # Sorted by source rank; rows of one rank stay in the order that they have there.
        arriving = (sources[wanted] * len(before) + _local_indices(have)[wanted]).argsort()
        return cls(
            axis,
            send=to.argsort(stable=True),
            sends=tuple(torch.bincount(to, minlength=axis.size).tolist()),
            receives=tuple(torch.bincount(sources[wanted], minlength=axis.size).tolist()),
            place=arriving.argsort(),
        )

    def __call__(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the rows of `x` along `dim` in the new order; differentiable. Every rank has to call it."""
        rows = x.movedim(dim, 0)
        sent = rows.index_select(0, self.send.to(x.device)).flatten(1)
        received = exchange_rows(sent, self.sends, self.receives, self.axis)
        ordered = received.index_select(0, self.place.to(x.device))
        return ordered.view(-1, *rows.shape[1:]).movedim(0, dim)


def _ranks(tokens_by_rank: Sequence[Tensor]) -> Tensor:
    """Return the rank of every token."""
    ranks = torch.empty(sum(map(len, tokens_by_rank)), dtype=torch.int64)
    for rank, tokens in enumerate(tokens_by_rank):
        ranks[tokens] = rank
    return ranks


def _local_indices(tokens_by_rank: Sequence[Tensor]) -> Tensor:
    """Return the row index of every token on its rank."""
    indices = torch.empty(sum(map(len, tokens_by_rank)), dtype=torch.int64)
    for tokens in tokens_by_rank:
        indices[tokens] = torch.arange(len(tokens))
    return indices

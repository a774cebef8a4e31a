"""Rows that lie over ranks in one order and are wanted in another: an all-to-all, and its inverse for gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.parallel.all_to_all_rows import exchange_rows
from longctx.parallel.mesh import Axis


@dataclass(frozen=True)
class Reorder:
    """What one rank sends and gets: rows of `[N, ...]`, one for each token that it has, to those that it wants."""

    axis: Axis
    send: Tensor
    """Its own rows in the order of the ranks that they go to, int64."""
    sends: tuple[int, ...]
    """How many go to each rank."""
    receives: tuple[int, ...]
    """How many each rank sends it."""
    place: Tensor
    """For each row that it wants, which of those that arrive it is, int64."""

    @classmethod
    def of(cls, have: Sequence[Tensor], want: Sequence[Tensor], axis: Axis) -> "Reorder":
        """From and to what every rank of the axis has and wants: numbers of tokens, int64 on the CPU, all of
        0, 1, ..., each once in either. Nothing communicates.

        Raises ValueError where these are not the same tokens.
        """
        before, after = (torch.cat(list(each)) for each in (have, want))
        everything = torch.arange(len(before))
        if not (torch.equal(before.sort().values, everything) and torch.equal(after.sort().values, everything)):
            raise ValueError(f"reorder: {len(before)} tokens and {len(after)}: expected 0, 1, ... once each in both")
        had, wanted = (_ranks(each) for each in (have, want))
        mine, desired = have[axis.rank], want[axis.rank]
        to = wanted[mine]
        # In the order of ranks, and of one rank's rows as they lie there.
        arriving = (had[desired] * len(before) + _places(have)[desired]).argsort()
        return cls(
            axis,
            send=to.argsort(stable=True),
            sends=tuple(torch.bincount(to, minlength=axis.size).tolist()),
            receives=tuple(torch.bincount(had[desired], minlength=axis.size).tolist()),
            place=arriving.argsort(),
        )

    def __call__(self, x: Tensor, dim: int = 0) -> Tensor:
        """The rows of `x` along `dim` in the new order; differentiable, every rank of the axis taking part."""
        rows = x.movedim(dim, 0)
        sent = rows.index_select(0, self.send.to(x.device)).flatten(1)
        arrived = exchange_rows(sent, self.sends, self.receives, self.axis)
        placed = arrived.index_select(0, self.place.to(x.device))
        return placed.view(-1, *rows.shape[1:]).movedim(0, dim)


def _ranks(each: Sequence[Tensor]) -> Tensor:
    """The rank of every token."""
    found = torch.empty(sum(map(len, each)), dtype=torch.int64)
    for rank, tokens in enumerate(each):
        found[tokens] = rank
    return found


def _places(each: Sequence[Tensor]) -> Tensor:
    """The place of every token on its rank."""
    found = torch.empty(sum(map(len, each)), dtype=torch.int64)
    for tokens in each:
        found[tokens] = torch.arange(len(tokens))
    return found

"""Visibility plans: which keys the queries of each KV owner see, and so which rows travel and which blocks exist.

A KV owner is one rank, or the ranks of an Ulysses group together: the pieces of the sequence whose keys and values are
in one tensor, ascending. Plans are made on the host from layout numbers only, once per batch, and all layers share
them: keys that no query sees are neither sent nor computed with.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from longctx.kernels.attention.block import CAUSAL_MASK, BlockMask, Mask, Positions
from longctx.kernels.attention.masks import plain_mask
from longctx.parallel.layout import Layout, Slice


def _document(layout: Layout, place: int) -> range:
    return range(layout.document_start(place), layout.document_end(place))


def keys_seen(layout: Layout, part: Slice, mask: Mask) -> list[range]:
    """Return the ranges of keys that the queries of a slice see between them."""
    if part.size == 0:
        return []
    first, last = _document(layout, part.begin), _document(layout, part.end - 1)
    if first == last:
        return [*mask.keys_seen(range(part.begin, part.end), first)]
    # All tokens of the documents between are in the slice, and each sees itself.
    between = range(first.stop, last.start)
    return [
        *mask.keys_seen(range(part.begin, first.stop), first),
        between,
        *mask.keys_seen(range(last.start, part.end), last),
    ]


def seen_pairs(layout: Layout, part: Slice, mask: Mask) -> int:
    """Count the query-key pairs that the queries of a slice see."""
    documents = pairwise(layout.documents_in(part))
    return sum(mask.pairs(range(begin, end), _document(layout, begin)) for begin, end in documents)


def score_elements(layout: Layout, mask: Mask = CAUSAL_MASK) -> int:
    """Count the query-key pairs that this rank's queries see."""
    return sum(seen_pairs(layout, part, mask) for part in layout.slices)


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
    """Merge ranges to ascending slices that neither touch nor overlap."""
    merged: list[list[int]] = []
    for begin, end in sorted(r for r in ranges if r[0] < r[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return tuple(slice(begin, end) for begin, end in merged)


def row_count(parts: Sequence[slice]) -> int:
    """Return the number of rows of slices together."""
    return sum(part.stop - part.start for part in parts)


@dataclass(frozen=True)
class VisibleBlock:
    """The rows `queries` of an owner's queries against the keys at hand, under `mask`."""

    queries: slice
    mask: BlockMask


class KVOwners:
    """The tokens of a sequence by KV owner: owner n has `pieces[n]`, ascending, in one tensor."""

    def __init__(self, layout: Layout, pieces: Sequence[Sequence[int]], mask: Mask) -> None:
        self.layout, self.mask = layout, mask
        self.pieces = tuple(tuple(sorted(numbers)) for numbers in pieces)

    @classmethod
    def of(cls, layout: Layout, ulysses: int, mask: Mask) -> "KVOwners":
        """Make each group of `ulysses` neighbouring ranks one owner; with 1, each rank."""
        groups = range(0, layout.size, ulysses)
        pieces = [[n for rank in range(first, first + ulysses) for n in layout.pieces_of(rank)] for first in groups]
        return cls(layout, pieces, mask)

    @cached_property
    def piece_locations(self) -> tuple[tuple[int, int], ...]:
        """For each piece in sequence order the owner that has it, and its index among the owner's pieces."""
        locations = {n: (owner, i) for owner, numbers in enumerate(self.pieces) for i, n in enumerate(numbers)}
        return tuple(locations[n] for n in range(len(locations)))

    def slices(self, owner: int) -> list[tuple[int, Slice]]:
        """Return the first row of each piece in the owner's tensor, and its tokens without padding."""
        step = self.layout.piece_length
        return [(i * step, self.layout.piece(n)) for i, n in enumerate(self.pieces[owner])]

    def tokens(self, owner: int) -> Tensor:
        """Return the place of each row of the owner's tensor in the sequence, int64; T and beyond for padding."""
        step = self.layout.piece_length
        return torch.cat([torch.arange(n * step, (n + 1) * step) for n in self.pieces[owner]])

    def needed(self, reader: int, source: int) -> tuple[slice, ...]:
        """Return the rows of `source`'s tensor whose keys a query of `reader` sees."""
        ranges = []
        for _, part in self.slices(reader):
            for seen in keys_seen(self.layout, part, self.mask):
                for first, held in self.slices(source):
                    begin, end = max(seen.start, held.begin), min(seen.stop, held.end)
                    ranges.append((first + begin - held.begin, first + end - held.begin))
        return _merged(ranges)

    def block(self, queries: Tensor, keys: Tensor, device: torch.device) -> VisibleBlock | None:
        """Return the block of queries and keys at sorted places of the sequence, without the queries at either end that
        see nothing; None where no query sees a key.

        Its mask is FULL or CAUSAL where possible, which every backend supports.
        """
        if queries.numel() == 0 or keys.numel() == 0:
            return None
        begin, end = self._positions(queries, keys, torch.device("cpu")).bounds
        seeing = (end > begin).nonzero()[:, 0]
        if seeing.numel() == 0:
            return None
        rows = slice(int(seeing[0]), int(seeing[-1]) + 1)
        plain = plain_mask(begin[rows], end[rows], keys.numel())
        return VisibleBlock(rows, plain or self._positions(queries[rows], keys, device))

    def routed(self, queries: Tensor, keys: Tensor) -> VisibleBlock | None:
        """Return the block of each head's own queries, at sorted places `[B, H, Tq]` (-1 sees nothing), and keys at
        sorted places; None without keys."""
        if keys.numel() == 0:
            return None
        return VisibleBlock(slice(0, queries.shape[2]), self._positions(queries.contiguous(), keys, queries.device))

    def _positions(self, queries: Tensor, keys: Tensor, device: torch.device) -> Positions:
        """Apply the mask to queries and keys at sorted places; queries at -1 are of no document."""
        inner = torch.tensor(self.layout.cu_seqlens[1:])
        of_query = torch.searchsorted(inner.to(queries.device), queries, right=True).masked_fill(queries < 0, -1)
        of_key = torch.searchsorted(inner, keys, right=True).to(device)
        return Positions(queries.to(device), keys.to(device), of_query.to(device), of_key, self.mask)

    @cached_property
    def score_elements(self) -> tuple[int, ...]:
        """Query-key pairs that the queries of each owner see: the measure of its work."""
        return tuple(
            sum(seen_pairs(self.layout, part, self.mask) for _, part in self.slices(owner))
            for owner in range(len(self.pieces))
        )

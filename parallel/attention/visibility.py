"""Which keys the queries of a slice see, and what one holder of tokens therefore needs of another.

A holder is one rank, or the ranks of an Ulysses group together: the pieces of the sequence whose keys lie in one place,
ascending. Worked out on the host from numbers alone, once per batch, and used by every layer: nothing that
no query sees is sent or computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from longctx.kernels.attention.block import CAUSAL, FULL, BlockMask, Positions
from longctx.parallel.layout import Layout, Slice


@dataclass(frozen=True)
class Reach:
    """What a query sees within its document: earlier keys and itself, or all; and how far at most.

    `window`: with `causal` the newest `window` keys, else the keys less than `window` away on both sides.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} holds no token; the least is 1")


def keys_seen(layout: Layout, part: Slice, reach: Reach) -> Slice:
    """The keys that the queries of a slice see between them: they follow each other without a gap."""
    if part.size == 0:
        return part
    begin = layout.document_start(part.begin)
    end = part.end if reach.causal else layout.document_end(part.end - 1)
    if reach.window is not None:
        begin = max(begin, part.begin - reach.window + 1)
        end = min(end, part.end - 1 + (1 if reach.causal else reach.window))
    return Slice(begin, end)


def _merged(ranges: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    """Ranges as ascending slices that neither touch nor overlap."""
    merged: list[list[int]] = []
    for begin, end in sorted(r for r in ranges if r[0] < r[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return tuple(slice(begin, end) for begin, end in merged)


def count(parts: Sequence[slice]) -> int:
    """The rows of slices together."""
    return sum(part.stop - part.start for part in parts)


def rows(x: Tensor, parts: Sequence[slice]) -> Tensor:
    """Some rows of `x [B, T, ...]`, one after the other; a view where it is one slice."""
    return x[:, parts[0]] if len(parts) == 1 else torch.cat([x[:, part] for part in parts], dim=1)


@dataclass(frozen=True)
class VisibleBlock:
    """The queries at `queries` of a holder against keys at hand, under a mask that shows each of them something."""

    queries: slice
    mask: BlockMask


class KVOwners:
    """The tokens of a sequence by holder: holder h has the pieces `numbers[h]`, ascending, in a tensor of its own."""

    def __init__(self, layout: Layout, numbers: Sequence[Sequence[int]], reach: Reach) -> None:
        self.layout, self.reach = layout, reach
        self.numbers = tuple(tuple(sorted(each)) for each in numbers)

    @classmethod
    def of(cls, layout: Layout, ulysses: int, reach: Reach) -> "KVOwners":
        """Each `ulysses` neighbouring ranks hold together; with 1, each by itself."""
        groups = range(0, layout.size, ulysses)
        numbers = [[n for rank in range(at, at + ulysses) for n in layout.numbers(rank)] for at in groups]
        return cls(layout, numbers, reach)

    def slices(self, owner: int) -> list[tuple[int, Slice]]:
        """Where each piece of a holder lies in its tensor, and its tokens without padding."""
        step = self.layout.piece_length
        return [(place * step, self.layout.piece(n)) for place, n in enumerate(self.numbers[owner])]

    def tokens(self, owner: int) -> Tensor:
        """The place of each row of a holder's tensor in the sequence, int64; T and beyond for padding."""
        step = self.layout.piece_length
        return torch.cat([torch.arange(n * step, (n + 1) * step) for n in self.numbers[owner]])

    def needed(self, reader: int, source: int) -> tuple[slice, ...]:
        """The rows of `source`'s tensor whose keys a query of `reader` sees."""
        ranges = []
        for _, part in self.slices(reader):
            seen = keys_seen(self.layout, part, self.reach)
            for at, held in self.slices(source):
                begin, end = max(seen.begin, held.begin), min(seen.end, held.end)
                ranges.append((at + begin - held.begin, at + end - held.begin))
        return _merged(ranges)

    def block(self, queries: Tensor, keys: Tensor, device: torch.device) -> VisibleBlock | None:
        """What queries at sorted places of the sequence see of keys at sorted places; None for nothing.

        As FULL or CAUSAL where it is, which every backend takes.
        """
        if queries.numel() == 0 or keys.numel() == 0:
            return None
        whole = self._positions(queries, keys, torch.device("cpu"))
        begin, end = whole.bounds
        seeing = (end > begin).nonzero()[:, 0]
        if seeing.numel() == 0:
            return None
        first, last = int(seeing[0]), int(seeing[-1]) + 1
        begin, end = begin[first:last], end[first:last]
        mask: BlockMask
        if bool((begin == 0).all()) and bool((end == keys.numel()).all()):
            mask = FULL
        elif last - first == keys.numel() and bool((begin == 0).all()) and torch.equal(end.long(), _counting(end)):
            mask = CAUSAL
        else:
            mask = self._positions(queries[first:last], keys, device)
        return VisibleBlock(slice(first, last), mask)

    def _positions(self, queries: Tensor, keys: Tensor, device: torch.device) -> Positions:
        """Of queries and keys at sorted places; queries, `[Tq]` or `[B, H, Tq]`, that have place -1 see nothing."""
        inner = torch.tensor(self.layout.cu_seqlens[1:])
        first = torch.searchsorted(inner.to(queries.device), queries, right=True).masked_fill(queries < 0, -1)
        second = torch.searchsorted(inner, keys, right=True).to(device)
        window, causal = self.reach.window, self.reach.causal
        return Positions(queries.to(device), keys.to(device), first.to(device), second, window, causal)

    def routed(self, queries: Tensor, keys: Tensor) -> VisibleBlock | None:
        """What queries of each head, at sorted places `[B, H, Tq]`, see of keys at sorted places; -1 sees nothing."""
        if keys.numel() == 0:
            return None
        return VisibleBlock(slice(0, queries.shape[2]), self._positions(queries.contiguous(), keys, queries.device))

    @cached_property
    def score_elements(self) -> tuple[int, ...]:
        """Query-key pairs that are seen, by the holder of the query: what the work of each is counted in."""
        return tuple(
            sum(seen_pairs(self.layout, part, self.reach) for _, part in self.slices(owner))
            for owner in range(len(self.numbers))
        )


def _counting(end: Tensor) -> Tensor:
    return torch.arange(1, end.numel() + 1)


def _sum(begin: int, end: int) -> int:
    """The numbers from `begin` to before `end`, added up."""
    return (begin + end - 1) * (end - begin) // 2


def seen_pairs(layout: Layout, part: Slice, reach: Reach) -> int:
    """Query-key pairs that the queries of a slice see: by sums of arithmetic progressions, however long it is."""
    total, window = 0, reach.window
    for begin, end in pairwise(layout.documents_in(part)):
        first, last = layout.document_start(begin), layout.document_end(begin)
        # Query i sees the keys from max(first, i + 1 - window) to before i + 1, or to before min(last, i + window).
        if window is None:
            low, far = (end - begin) * first, (end - begin) * last
        else:
            turn = min(max(first + window - 1, begin), end)
            low = (turn - begin) * first + _sum(turn + 1 - window, end + 1 - window)
            turn = min(max(last - window, begin), end)
            far = _sum(begin + window, turn + window) + (end - turn) * last
        total += (_sum(begin + 1, end + 1) if reach.causal else far) - low
    return total


def score_elements(layout: Layout, reach: Reach = Reach()) -> int:
    """Query-key pairs that this rank's queries see."""
    return sum(seen_pairs(layout, part, reach) for part in layout.slices)

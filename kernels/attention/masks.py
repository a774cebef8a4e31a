"""Attention masks: which keys a query sees, from the mixer down to the tiles that a kernel computes.

Three levels. `Mask` is what a mixer chooses: which keys of its own document a query sees, whatever the length, packing
and split of the sequence. `Positions` applies a mask to the queries and keys at hand, of any blocks of any documents.
Keys are sorted, so what one query sees is an interval, two integers per query: it sees the keys `begin <= j < end`.
Both grow from query to query. That is all that the implementations of block attention (tiles of torch operators, the
Triton kernel, FlexAttention) know about a mask. `MaskTile` is a rectangle of it under a simpler mask, for operators
that support no positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor


class Mask(Protocol):
    """Which keys of its document a query sees; hashable, since plans are cached by it.

    Schedules, the cost model, the decode cache and `Positions` use only these methods, so another kind of mask is
    another class. Ranges are of places in the packed sequence, and every query sees its own token. `bounds` is one
    range of keys per query, the same for all heads: masks of several ranges (sinks, strides) or of head groups extend
    it and `Positions`, whose parts merge by lse, and no signature above these.
    """

    def keys_seen(self, queries: range, document: range) -> Sequence[range]:
        """Return the keys that `queries`, a part of `document`, see between them."""

    def pairs(self, queries: range, document: range) -> int:
        """Count the query-key pairs that `queries`, a part of `document`, see: the work of attention."""

    def bounds(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the lowest place that the query at each place sees and the place after the highest one, of the shape
        of `query`, neither decreasing; None where only the document bounds it."""

    def cached_keys(self, tokens: int) -> int:
        """Return how many of a document's newest `tokens` keys its next query sees, and so a decode cache keeps; no
        later query sees an older one."""


@dataclass(frozen=True)
class IntervalMask:
    """A monotone range of keys per query: causal or bidirectional, over the whole document or a sliding window.

    The query at p sees the key at s where `not causal or s <= p`, and with a window where `p - s < window` (causal)
    or `|p - s| < window` (bidirectional). Raises ValueError for a window without a token.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention mask: a window of {self.window} holds no token; the least is 1")

    @property
    def _back(self) -> int | None:
        """The distance of the oldest visible key; None for all of the document."""
        return None if self.window is None else self.window - 1

    @property
    def _ahead(self) -> int | None:
        """The distance of the newest visible key; None for all of the document."""
        return 0 if self.causal else self._back

    def keys_seen(self, queries: range, document: range) -> tuple[range]:
        """Return the keys that `queries` see: one range, since the ranges of neighbouring queries overlap."""
        begin, end = document.start, document.stop
        if self._back is not None:
            begin = max(begin, queries.start - self._back)
        if self._ahead is not None:
            end = min(end, queries.stop + self._ahead)
        return (range(begin, end),)

    def pairs(self, queries: range, document: range) -> int:
        """Count the query-key pairs by sums of arithmetic progressions, in the same time at any length."""
        # Query i sees the keys from max(document.start, i - back) to before min(document.stop, i + ahead + 1).
        first, last = queries.start, queries.stop
        begins, ends = len(queries) * document.start, len(queries) * document.stop
        if self._back is not None:
            turn = min(max(document.start + self._back, first), last)
            begins = (turn - first) * document.start + _sum(turn - self._back, last - self._back)
        if self._ahead is not None:
            reach = self._ahead + 1
            turn = min(max(document.stop - reach, first), last)
            ends = _sum(first + reach, turn + reach) + (last - turn) * document.stop
        return ends - begins

    def bounds(self, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the lowest visible place of each query and the place after the highest; None where the document bounds
        it."""
        low = None if self._back is None else query - self._back
        high = None if self._ahead is None else query + (self._ahead + 1)
        return low, high

    def cached_keys(self, tokens: int) -> int:
        """Return how many of the newest `tokens` keys the next query sees."""
        return tokens if self._back is None else min(tokens, self._back)


CAUSAL_MASK = IntervalMask()
"""Every earlier token of the document and the query's own: the default."""


def _sum(begin: int, end: int) -> int:
    """Add up the integers from `begin` to before `end`."""
    return (begin + end - 1) * (end - begin) // 2


class PlainMask(Enum):
    """The masks of one block that need no tensor."""

    FULL = "full"
    CAUSAL = "causal"


FULL, CAUSAL = PlainMask.FULL, PlainMask.CAUSAL

TileMask = PlainMask | Tensor
"""A mask without positions, as operators over one tile take it; the tensor is bool, True where a query sees a key."""


@dataclass(frozen=True, eq=False)
class Positions:
    """A mask applied to one block: the place of each query and of each key in the sequence, and their documents.

    A query sees a key of its own document where `mask` shows it. So a sliding window, packed documents, the two halves
    of a zigzag rank, blocks of a ring in any order, and the queries that a router gathered for each head are one form.

    Shapes: query `[Tq]`, or `[B, H, Tq]` where each head of each sequence has its own queries; key `[Tk]`;
    query_document and key_document, both or neither, of the same shapes. Integers, on the device of q. A query that
    must see nothing (padding) takes a place before every key (under a causal mask), or a document that no key has.

    Raises ValueError where queries (along the last dim) or keys are not sorted by document, then position; equal
    neighbours are allowed. This is checked once, when the mask is made, and synchronizes with the device: make it once
    per batch, not once per layer, where it does not depend on the layer.
    """

    query: Tensor
    key: Tensor
    query_document: Tensor | None = None
    key_document: Tensor | None = None
    mask: Mask = CAUSAL_MASK
    bounds: tuple[Tensor, Tensor] = field(init=False, repr=False)
    """begin and end of the keys that each query sees, int32, of the shape of `query`."""

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "bounds", self._bounds())

    def _check(self) -> None:
        if (self.query_document is None) != (self.key_document is None):
            raise ValueError("attention mask: give documents for both queries and keys, or for neither")
        if self.query.dim() not in (1, 3) or self.key.dim() != 1:
            raise ValueError(
                f"attention mask: query positions must be [Tq] or [B, H, Tq] and key positions [Tk], "
                f"not {tuple(self.query.shape)} and {tuple(self.key.shape)}"
            )
        for name, position, document in (
            ("query", self.query, self.query_document),
            ("key", self.key, self.key_document),
        ):
            tensors = [x for x in (position, document) if x is not None]
            if any(x.is_floating_point() or x.is_complex() or x.dtype == torch.bool for x in tensors):
                raise ValueError(f"attention mask: {name} positions and documents must be integers")
            if any(x.shape != position.shape or x.device != self.query.device for x in tensors):
                raise ValueError(
                    f"attention mask: {name} positions and documents must be of one shape, and all on one device"
                )
            earlier, later = position[..., :-1], position[..., 1:]
            ordered = earlier <= later
            if document is not None:
                before, after = document[..., :-1], document[..., 1:]
                ordered = (before < after) | ((before == after) & ordered)
            if not bool(ordered.all()):
                by = "position" if document is None else "document, then position"
                raise ValueError(f"attention mask: the {name} positions are not sorted by {by}")

    def _bounds(self) -> tuple[Tensor, Tensor]:
        position, key = self.query.long().contiguous(), self.key.long()
        if key.numel() == 0:
            nothing = torch.zeros_like(position, dtype=torch.int32)
            return nothing, nothing
        # A document is identified by the index of its first key. Document and position form one number, by which all
        # keys are sorted; positions are clamped to their range and one beyond, so that no document overlaps the next.
        first = torch.zeros_like(position)
        last = torch.full_like(position, key.numel())
        key_first = torch.zeros_like(key)
        if self.query_document is not None and self.key_document is not None:
            documents = self.key_document.long().contiguous()
            wanted = self.query_document.long().contiguous()
            first, last = (torch.searchsorted(documents, wanted, right=right) for right in (False, True))
            key_first = torch.searchsorted(documents, documents)
        least, most = key.amin(), key.amax()
        beyond = most - least + 1
        numbers = key_first * (beyond + 1) + (key - least)

        def index_of(place: Tensor) -> Tensor:
            """The index of the first key of the query's document at `place` or after it."""
            within = torch.minimum((place - least).clamp_min(0), beyond)
            index = torch.searchsorted(numbers, first * (beyond + 1) + within)
            return torch.minimum(torch.maximum(index, first), last)

        low, high = self.mask.bounds(position)
        begin = first if low is None else index_of(low)
        end = last if high is None else index_of(high)
        return begin.int(), end.int()


BlockMask = PlainMask | Tensor | Positions


def sliding_window(
    queries: int, keys: int, mask: Mask = CAUSAL_MASK, offset: int = 0, device: torch.device | str = "cpu"
) -> Positions:
    """Apply a mask to consecutive tokens of one document: keys at 0, 1, ..., and query i at `offset + i`."""
    places = torch.arange(offset, offset + queries, device=device)
    return Positions(places, torch.arange(keys, device=device), mask=mask)


def packed_documents(
    cu_seqlens: Sequence[int], mask: Mask = CAUSAL_MASK, device: torch.device | str = "cpu"
) -> Positions:
    """Apply a mask within the documents `[cu_seqlens[n], cu_seqlens[n + 1])` of one packed (varlen) sequence."""
    bounds = torch.tensor(cu_seqlens, dtype=torch.int64)
    if bounds.dim() != 1 or len(bounds) < 1 or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
        raise ValueError("attention mask: cu_seqlens must begin with 0 and must not decrease")
    lengths = bounds.diff()
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    places = torch.arange(len(documents), device=device)
    return Positions(places, places, documents, documents, mask)


def key_bounds(mask: PlainMask | Positions, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return begin and end of the keys that each query sees: int32 `[Tq]`, or `[B, H, Tq]` where heads differ."""
    if isinstance(mask, Positions):
        return mask.bounds
    begin = torch.zeros(queries, dtype=torch.int32, device=device)
    if mask is FULL:
        return begin, torch.full_like(begin, keys)
    return begin, torch.arange(1, queries + 1, dtype=torch.int32, device=device)


def plain_mask(begin: Tensor, end: Tensor, keys: int) -> PlainMask | None:
    """Return FULL or CAUSAL, which every backend takes, where `[Tq]` bounds over `keys` keys are those of it."""
    if bool(begin.any()):
        return None
    if bool((end == keys).all()):
        return FULL
    return CAUSAL if len(end) == keys and _counts_up(end) else None


def query_bounds(begin: Tensor, end: Tensor, keys: int, tile: int) -> tuple[Tensor, Tensor]:
    """Return the first query that sees each tile of `tile` keys, and the end of those that do: int32 `[..., tiles]`.

    Takes the result of `key_bounds`. Between the two, only queries that see nothing at all do not see the tile.
    """
    edges = (torch.arange(-(-keys // tile) + 1, dtype=begin.dtype, device=begin.device) * tile).clamp_max(keys)
    edges = edges.expand(*begin.shape[:-1], -1)
    first = torch.searchsorted(end.contiguous(), edges[..., :-1].contiguous(), right=True)
    last = torch.searchsorted(begin.contiguous(), edges[..., 1:].contiguous())
    return first.int(), last.int()


def visible_tiles(begin: Tensor, end: Tensor, q_tile: int, k_tile: int) -> Iterator[tuple[int, range]]:
    """Yield the runs of key tiles that each query tile has to compute, as (query tile, range of key tiles), in order.

    Takes `[Tq]` bounds. A key tile is in a run if and only if a query of the tile sees one of its keys. The Triton
    kernel walks the same runs, found in the same way: a run begins with the first visible key that is not yet done, and
    ends where no key is left before the keys of the next query begin.
    """
    for tile, (lows, highs) in enumerate(zip(begin.split(q_tile), end.split(q_tile), strict=True)):
        following = torch.cat([lows[1:], torch.full_like(lows[:1], torch.iinfo(lows.dtype).max)])
        closing = following > highs
        done = 0
        while bool((seeing := highs > lows.clamp_min(done)).any()):
            start = int(lows[seeing].clamp_min(done).min())
            stop = int(highs[closing & (highs > start)].min())
            run = range(start // k_tile, -(-stop // k_tile))
            yield tile, run
            done = run.stop * k_tile


@dataclass(frozen=True)
class MaskTile:
    """Queries `[q_begin, q_end)` against keys `[k_begin, k_end)` under a mask that every backend takes."""

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    mask: TileMask


FINE = 256
"""The most queries under one bool mask: half of the scores that are computed there are not visible."""


def mask_tiles(begin: Tensor, end: Tensor, q_tile: int, k_tile: int) -> list[MaskTile]:
    """Cut a mask of `[Tq]` bounds, or of `[G, Tq]` for heads together, into rectangles and triangles with plain masks.

    Keys that all queries of a query tile see form one MaskTile without a mask, however many they are (unless they are
    fewer than `q_tile`, and not worth a call). The rest is cut into tiles of `k_tile` keys, and those that are neither
    full nor causal into tiles of `FINE` queries in the same way, with bool masks of at most `q_tile * k_tile` (per
    head). None is empty.
    """
    tiles: list[MaskTile] = []
    begin, end = begin.cpu(), end.cpu()
    for top, left, right in _spans(begin, end, q_tile, k_tile):
        bottom = min(top + q_tile, begin.shape[-1])
        tiles.extend(_tile(top, left, right, begin[..., top:bottom], end[..., top:bottom], q_tile, k_tile))
    return tiles


def _spans(begin: Tensor, end: Tensor, q_tile: int, k_tile: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first query of a query tile, and begin and end of keys that the tile sees."""
    if begin.dim() == 1:
        runs = ((tile * q_tile, run) for tile, run in visible_tiles(begin, end, q_tile, k_tile))
    else:
        # Heads see different ranges: the gaps between them are left to the masks.
        everything = range(-(-int(end.max()) // k_tile)) if end.numel() else range(0)
        runs = ((top, everything) for top in range(0, begin.shape[-1], q_tile))
    for top, run in runs:
        lows, highs = begin[..., top : top + q_tile], end[..., top : top + q_tile]
        seeing = highs > lows
        if bool(seeing.any()):
            left = max(run.start * k_tile, int(lows[seeing].min()))
            yield top, left, min(run.stop * k_tile, int(highs[seeing].max()))


def _tile(top: int, left: int, right: int, lows: Tensor, highs: Tensor, q_tile: int, k_tile: int) -> Iterator[MaskTile]:
    """Cut the keys `[left, right)` of a query tile that begins at query `top`, with bounds lows and highs."""
    shared = max(int(lows.max()), left), min(int(highs.min()), right)
    if shared[1] - shared[0] >= q_tile:
        yield from _masked(top, left, shared[0], lows, highs, k_tile)
        yield MaskTile(top, top + lows.shape[-1], *shared, FULL)
        yield from _masked(top, shared[1], right, lows, highs, k_tile)
    else:
        yield from _masked(top, left, right, lows, highs, k_tile)


def _masked(top: int, left: int, right: int, lows: Tensor, highs: Tensor, k_tile: int) -> Iterator[MaskTile]:
    """Cut the keys `[left, right)` into key tiles, each with the queries that see some of it."""
    for at in range(left, right, k_tile):
        stop = min(at + k_tile, right)
        seeing = (lows < stop) & (highs > at) & (highs > lows)
        rows = seeing.view(-1, seeing.shape[-1]).any(dim=0).nonzero()[:, 0].tolist()
        if not rows:
            continue
        first, last = rows[0], rows[-1] + 1
        low, high = lows[..., first:last], highs[..., first:last]
        mask: TileMask
        if bool((low <= at).all()) and bool((high >= stop).all()):
            mask = FULL
        elif last - first == stop - at and bool((low <= at).all()) and _counts_up(high - at):
            mask = CAUSAL
        elif last - first > FINE:
            for inner in range(0, last - first, FINE):
                part = slice(inner, inner + FINE)
                yield from _tile(top + first + inner, at, stop, low[..., part], high[..., part], FINE, k_tile)
            continue
        else:
            keys = torch.arange(at, stop, dtype=lows.dtype)
            mask = (keys >= low[..., None]) & (keys < high[..., None])
        yield MaskTile(top + first, top + last, at, stop, mask)


def _counts_up(ends: Tensor) -> bool:
    """Whether they are 1, 2, 3 ..."""
    return bool((ends == torch.arange(1, ends.shape[-1] + 1, dtype=ends.dtype, device=ends.device)).all())

"""What a query sees: the masks of block attention, and which tiles a mask leaves to compute.

Keys are sorted, so the keys that one query sees stand next to each other. Every mask but a bool tensor is therefore
two integers a query, `begin` and `end`: it sees the keys `begin <= j < end`. Both grow from query to query. The forms
that compute attention (tiles of torch operators, the Triton kernel, FlexAttention) know no more of a mask than that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class Mask(Enum):
    """The masks that need no tensor."""

    FULL = "full"
    CAUSAL = "causal"


FULL, CAUSAL = Mask.FULL, Mask.CAUSAL


@dataclass(frozen=True, eq=False)
class Positions:
    """A mask given by the place of each query and of each key in the sequence, and by their documents.

    The query at p sees the key at s where `not causal or s <= p`, where `window is None or p - s < window` (without
    `causal`: `|p - s| < window`), and where both have the same document. So a sliding window, packed documents, the two
    halves of a zigzag rank, blocks of a ring in any order, and the queries that a router gathered for each head are
    one mask.

    Shapes: query `[Tq]`, or `[B, H, Tq]` where each head of each sequence has queries of its own; key `[Tk]`;
    query_document and key_document, both or neither, of the same shapes. Integers, on the device of q. A query that
    has to see nothing (padding) takes a position before every key, or a document that no key has.

    Raises ValueError where queries (along the last dim) or keys are not sorted by document, then position; equal
    neighbours are allowed. That is looked at once, when the mask is made, and costs a wait for the device: make a mask
    once a batch, not once a layer, where it does not depend on the layer.
    """

    query: Tensor
    key: Tensor
    query_document: Tensor | None = None
    key_document: Tensor | None = None
    window: int | None = None
    causal: bool = True
    bounds: tuple[Tensor, Tensor] = field(init=False, repr=False)
    """begin and end of the keys that each query sees, int32, of the shape of `query`."""

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "bounds", self._bounds())

    def _check(self) -> None:
        if (self.query_document is None) != (self.key_document is None):
            raise ValueError("attention mask: documents are given for the queries or for the keys, not for both")
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention mask: a window of {self.window} holds no token; the least is 1")
        if self.query.dim() not in (1, 3) or self.key.dim() != 1:
            raise ValueError(
                f"attention mask: query positions are [Tq] or [B, H, Tq] and key positions [Tk], "
                f"not {tuple(self.query.shape)} and {tuple(self.key.shape)}"
            )
        for name, position, document in (
            ("query", self.query, self.query_document),
            ("key", self.key, self.key_document),
        ):
            given = [x for x in (position, document) if x is not None]
            if any(x.is_floating_point() or x.is_complex() or x.dtype == torch.bool for x in given):
                raise ValueError(f"attention mask: {name} positions and documents are integers")
            if any(x.shape != position.shape or x.device != self.query.device for x in given):
                raise ValueError(
                    f"attention mask: {name} positions and documents are of one shape, and all are on one device"
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
        # A document is known by the place of its first key. Document and position make one number, in which all keys
        # are sorted; positions are clamped to their range and one beyond, so that no document reaches into the next.
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

        def reached(place: Tensor) -> Tensor:
            within = torch.minimum((place - least).clamp_min(0), beyond)
            found = torch.searchsorted(numbers, first * (beyond + 1) + within)
            return torch.minimum(torch.maximum(found, first), last)

        begin, end = first, last
        if self.window is not None:
            begin = reached(position - self.window + 1)
        if self.causal:
            end = reached(position + 1)
        elif self.window is not None:
            end = reached(position + self.window)
        return begin.int(), end.int()


BlockMask = Mask | Tensor | Positions


def sliding_window(
    queries: int, keys: int, window: int, offset: int = 0, causal: bool = True, device: torch.device | str = "cpu"
) -> Positions:
    """Each query sees the `window` keys up to its own place (without `causal`: less than `window` away on both sides).

    The keys stand at 0, 1, ...; query i stands at `offset + i`.
    """
    places = torch.arange(offset, offset + queries, device=device)
    return Positions(places, torch.arange(keys, device=device), window=window, causal=causal)


def packed_documents(
    cu_seqlens: Sequence[int], window: int | None = None, causal: bool = True, device: torch.device | str = "cpu"
) -> Positions:
    """Self-attention within the documents `[cu_seqlens[n], cu_seqlens[n + 1])` of one packed sequence."""
    bounds = torch.tensor(cu_seqlens, dtype=torch.int64)
    if bounds.dim() != 1 or len(bounds) < 1 or bounds[0] != 0 or bool((bounds.diff() < 0).any()):
        raise ValueError("attention mask: cu_seqlens begins with 0 and does not decrease")
    lengths = bounds.diff()
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
    places = torch.arange(len(documents), device=device)
    return Positions(places, places, documents, documents, window, causal)


def key_bounds(mask: Mask | Positions, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """begin and end of the keys that each query sees: int32 `[Tq]`, or `[B, H, Tq]` where heads differ."""
    if isinstance(mask, Positions):
        return mask.bounds
    begin = torch.zeros(queries, dtype=torch.int32, device=device)
    if mask is FULL:
        return begin, torch.full_like(begin, keys)
    return begin, torch.arange(1, queries + 1, dtype=torch.int32, device=device)


def query_bounds(begin: Tensor, end: Tensor, keys: int, tile: int) -> tuple[Tensor, Tensor]:
    """For each tile of `tile` keys the first query and the end of the queries that see it: int32 `[..., tiles]`.

    Takes what `key_bounds` gives. Between the two, only queries that see nothing at all do not see the tile.
    """
    edges = (torch.arange(-(-keys // tile) + 1, dtype=begin.dtype, device=begin.device) * tile).clamp_max(keys)
    edges = edges.expand(*begin.shape[:-1], -1)
    first = torch.searchsorted(end.contiguous(), edges[..., :-1].contiguous(), right=True)
    last = torch.searchsorted(begin.contiguous(), edges[..., 1:].contiguous())
    return first.int(), last.int()


def visible_tiles(begin: Tensor, end: Tensor, q_tile: int, k_tile: int) -> Iterator[tuple[int, range]]:
    """The runs of key tiles that each query tile has to compute, as (query tile, range of key tiles), in order.

    Takes `[Tq]` bounds. A key tile is in a run if and only if a query of the tile sees one of its keys. The Triton
    kernel walks the same runs, found in the same way: a run begins with the first key that is not yet done, and ends
    where no key is left before the keys of the next query begin.
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
class Piece:
    """Queries `[q_begin, q_end)` against keys `[k_begin, k_end)` under a mask that every backend takes."""

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    mask: Mask | Tensor


FINE = 256
"""Queries of a bool mask at most: half of what is computed under it is not seen."""


def pieces(begin: Tensor, end: Tensor, q_tile: int, k_tile: int) -> list[Piece]:
    """A mask of `[Tq]` bounds, or of `[G, Tq]` for heads together, cut into rectangles and triangles with a plain mask.

    Where all queries of a tile see a stretch of keys, it is one piece without mask, as long as it is (unless it is
    shorter than `q_tile`, and not worth a piece). The rest is cut into tiles of `k_tile` keys, and where these are not
    full or causal into tiles of `FINE` queries in the same way, with bool masks of at most `q_tile * k_tile` (of each
    head). None is empty.
    """
    cut: list[Piece] = []
    begin, end = begin.cpu(), end.cpu()
    for top, left, right in _spans(begin, end, q_tile, k_tile):
        bottom = min(top + q_tile, begin.shape[-1])
        cut.extend(_tile(top, left, right, begin[..., top:bottom], end[..., top:bottom], q_tile, k_tile))
    return cut


def _tile(top: int, left: int, right: int, lows: Tensor, highs: Tensor, q_tile: int, k_tile: int) -> Iterator[Piece]:
    """The keys `[left, right)` of the queries from `top` on, which see what lows and highs say."""
    shared = max(int(lows.max()), left), min(int(highs.min()), right)
    if shared[1] - shared[0] >= q_tile:
        yield from _masked(top, left, shared[0], lows, highs, k_tile)
        yield Piece(top, top + lows.shape[-1], *shared, FULL)
        yield from _masked(top, shared[1], right, lows, highs, k_tile)
    else:
        yield from _masked(top, left, right, lows, highs, k_tile)


def _spans(begin: Tensor, end: Tensor, q_tile: int, k_tile: int) -> Iterator[tuple[int, int, int]]:
    """For tiles of queries the first query, and from where to where there are keys that they see."""
    if begin.dim() == 1:
        runs = ((tile * q_tile, run) for tile, run in visible_tiles(begin, end, q_tile, k_tile))
    else:
        # Heads see different stretches: what lies between them is left to the masks.
        everything = range(-(-int(end.max()) // k_tile)) if end.numel() else range(0)
        runs = ((top, everything) for top in range(0, begin.shape[-1], q_tile))
    for top, run in runs:
        lows, highs = begin[..., top : top + q_tile], end[..., top : top + q_tile]
        seeing = highs > lows
        if bool(seeing.any()):
            left = max(run.start * k_tile, int(lows[seeing].min()))
            yield top, left, min(run.stop * k_tile, int(highs[seeing].max()))


def _masked(top: int, left: int, right: int, lows: Tensor, highs: Tensor, k_tile: int) -> Iterator[Piece]:
    """The keys `[left, right)` in tiles, each with the queries that see some of it."""
    for at in range(left, right, k_tile):
        stop = min(at + k_tile, right)
        seeing = (lows < stop) & (highs > at) & (highs > lows)
        rows = seeing.view(-1, seeing.shape[-1]).any(dim=0).nonzero()[:, 0].tolist()
        if not rows:
            continue
        first, last = rows[0], rows[-1] + 1
        low, high = lows[..., first:last], highs[..., first:last]
        mask: Mask | Tensor
        if bool((low <= at).all()) and bool((high >= stop).all()):
            mask = FULL
        elif last - first == stop - at and bool((low <= at).all()) and _counts_up(high - at):
            mask = CAUSAL
        elif last - first > FINE:
            for inner in range(0, last - first, FINE):
                some = slice(inner, inner + FINE)
                yield from _tile(top + first + inner, at, stop, low[..., some], high[..., some], FINE, k_tile)
            continue
        else:
            keys = torch.arange(at, stop, dtype=lows.dtype)
            mask = (keys >= low[..., None]) & (keys < high[..., None])
        yield Piece(top + first, top + last, at, stop, mask)


def _counts_up(ends: Tensor) -> bool:
    """Whether they are 1, 2, 3 ..."""
    return bool((ends == torch.arange(1, ends.shape[-1] + 1, dtype=ends.dtype)).all())

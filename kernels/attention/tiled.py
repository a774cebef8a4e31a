"""Block attention in torch operators, the merge of blocks by lse, and the cut of position masks into tiles.

`HeadwiseBackend` turns an operator over one tile (`[B, H, T, D]`, one key head per query head; no mask, the causal one
or a bool tensor `[Tq, Tk]` or `[H, Tq, Tk]`) into a backend: it loops over the query heads of a group (grouped-query
attention), and over the tiles of a mask by position.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels.attention.masks import CAUSAL, FULL, BlockMask, MaskTile, Positions, TileMask, mask_tiles
from longctx.kernels.dtypes import accumulation_dtype

TILE = 1024
"""Keys per tile, of the tiled form and of a mask by position."""

QUERY_TILES = (256, 1024)
"""The fewest and the most queries per tile of a mask by position. Between them: an eighth of the keys that a query sees
on average, so that tiles of short windows and documents are not mostly masked, and operator calls are not too small."""

Gradients = tuple[Tensor, Tensor, Tensor]


def dense_rows(x: Tensor) -> Tensor:
    """Return x with stride 1 in its last dim, which operators and kernels assume without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def finite(lse: Tensor) -> Tensor:
    """Replace -inf by 0, so that rows that see nothing have weights exp(-inf - 0) = 0, not exp(-inf + inf)."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into `out [..., D]` and `lse [...]`, in place, in their dtype (the accumulation dtype)."""
    total = torch.logaddexp(lse, block_lse)
    kept = torch.exp(lse - finite(total))[..., None]
    added = torch.exp(block_lse - finite(total))[..., None]
    out.mul_(kept).add_(block_out * added)
    lse.copy_(total)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge the result of a block into a running one, in place: the online softmax over blocks of keys.

    Shapes: out `[B, T, H, D]`, lse `[B, H, T]`, the running ones in the accumulation dtype. A query that sees nothing
    in the block (block_lse -inf) keeps its result; one that has seen nothing in any block stays 0 / -inf.
    """
    _merge_(out.transpose(1, 2), lse, block_out.transpose(1, 2), block_lse)


class HeadwiseBackend(ABC):
    """A backend over an operator for one tile with as many key heads as query heads."""

    @abstractmethod
    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """Return out and lse, for tensors `[B, H, T, D]`."""

    @abstractmethod
    def block_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """Return dq, dk, dv, for tensors `[B, H, T, D]`, from the global out and lse."""

    def operands(self, *tensors: Tensor) -> list[Tensor]:
        """Convert the tensors to the dtype in which the operator computes."""
        return list(tensors)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        """Return out and lse, shapes as in longctx.kernels.attention."""
        q, k, v = self.operands(q, k, v)
        if not isinstance(mask, Positions):
            return self._grouped_forward(q, k, v, mask, scale)
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)
        for heads in _tiled_heads(mask, q, k):
            queries, keys, values = heads.queries(q), heads.keys(k), heads.keys(v)
            heads_out, heads_lse = heads.queries(out), heads.queries(lse.transpose(1, 2), float("-inf"))
            for tile in heads.tiles:
                at, seen = slice(tile.q_begin, tile.q_end), slice(tile.k_begin, tile.k_end)
                tile_out, tile_lse = self._grouped_forward(
                    queries[:, at], keys[:, seen], values[:, seen], tile.mask, scale
                )
                merge_(heads_out[:, at], heads_lse[:, at].transpose(1, 2), tile_out, tile_lse)
            heads.store_queries(out, heads_out)
            heads.store_queries(lse.transpose(1, 2), heads_lse)
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> Gradients:
        """Return dq, dk, dv, shapes as in longctx.kernels.attention."""
        do, q, k, v, out = self.operands(do, q, k, v, out)
        if not isinstance(mask, Positions):
            return self._grouped_backward(do, q, k, v, out, lse, mask, scale)
        dtype = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
        for heads in _tiled_heads(mask, q, k):
            heads_do, queries, heads_out = heads.queries(do), heads.queries(q), heads.queries(out)
            keys, values, heads_lse = heads.keys(k), heads.keys(v), heads.queries(lse.transpose(1, 2))
            sums = heads.queries(dq), heads.zeros_of_keys(dk), heads.zeros_of_keys(dv)
            for tile in heads.tiles:
                at, seen = slice(tile.q_begin, tile.q_end), slice(tile.k_begin, tile.k_end)
                grads = self._grouped_backward(
                    heads_do[:, at],
                    queries[:, at],
                    keys[:, seen],
                    values[:, seen],
                    heads_out[:, at],
                    heads_lse[:, at].transpose(1, 2),
                    tile.mask,
                    scale,
                )
                for total, rows, grad in zip(sums, (at, seen, seen), grads, strict=True):
                    total[:, rows] += grad
            heads.store_queries(dq, sums[0])
            for target, total in zip((dk, dv), sums[1:], strict=True):
                heads.add_keys(target, total)
        return dq, dk, dv

    def _grouped_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        groups = q.shape[2] // k.shape[2]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if groups == 1:
            out, lse = self.block_forward(q.transpose(1, 2), keys, values, mask, scale)
            return out.transpose(1, 2), lse
        out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q.dtype), device=q.device)
        for group in range(groups):
            # The group-th query head of every key head: as many heads as k and v have, so nothing is repeated.
            queries = q[:, :, group::groups].transpose(1, 2)
            group_out, lse[:, group::groups] = self.block_forward(queries, keys, values, mask, scale)
            out[:, :, group::groups] = group_out.transpose(1, 2)
        return out, lse

    def _grouped_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        groups = q.shape[2] // k.shape[2]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        if groups == 1:
            do, q, k, v, out = (x.transpose(1, 2) for x in (do, q, k, v, out))
            dq, dk, dv = self.block_backward(do, q, k, v, out, lse.contiguous(), mask, scale)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=k.device) for x in (k, v))
        for group in range(groups):
            heads = (slice(None), slice(None), slice(group, None, groups))
            group_dq, group_dk, group_dv = self.block_backward(
                do[heads].transpose(1, 2),
                q[heads].transpose(1, 2),
                keys,
                values,
                out[heads].transpose(1, 2),
                lse[:, group::groups].contiguous(),
                mask,
                scale,
            )
            dq[heads] = group_dq.transpose(1, 2)
            dk += group_dk.transpose(1, 2)
            dv += group_dv.transpose(1, 2)
        return dq, dk, dv


def _query_tile(begin: Tensor, end: Tensor) -> int:
    few, most = QUERY_TILES
    seen = (end - begin).clamp_min(0).double().mean().item() if begin.numel() else 0.0
    return min(max(1 << int(seen / 8).bit_length() >> 1, few), most)


@dataclass(frozen=True)
class _TiledHeads:
    """Heads that are computed with the same mask tiles: all (`heads` None), or a few heads of sequence `row`.

    A few heads are copied out of the tensors, each with its rows together, and stored back when they are done.
    """

    tiles: list[MaskTile]
    row: int = 0
    heads: list[int] | None = None
    kv_heads: tuple[int, ...] = ()
    blind: Tensor | None = None
    """`[Tq, G]` bool: the queries that see nothing, whose rows may hold anything."""

    def _select(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        return torch.stack([x[self.row, :, head] for head in heads]).transpose(0, 1)[None]

    def queries(self, x: Tensor, blind: float = 0.0) -> Tensor:
        """Select these heads of `[B, Tq, H, ...]`, as `[1, Tq, G, ...]` with `blind` where a query sees nothing, or
        return x itself for all heads."""
        if self.heads is None or self.blind is None:
            return x
        selected = self._select(x, self.heads)
        return selected.masked_fill_(self.blind[..., None] if x.dim() == 4 else self.blind, blind)

    def keys(self, x: Tensor) -> Tensor:
        """Select the key/value head that each of these heads reads, of `[B, Tk, H_kv, ...]`, or return x itself."""
        return x if self.heads is None else self._select(x, self.kv_heads)

    def zeros_of_keys(self, x: Tensor) -> Tensor:
        """Return zeros to sum gradients of `keys(x)` in, or x itself."""
        return x if self.heads is None else torch.zeros_like(self.keys(x))

    def store_queries(self, x: Tensor, selected: Tensor) -> None:
        """Write the result for `queries(x)` back to x."""
        if self.heads is not None:
            x[self.row, :, self.heads] = selected[0]

    def add_keys(self, x: Tensor, sums: Tensor) -> None:
        """Add the sums for `keys(x)` to x; several of the heads may have read one key/value head."""
        if self.heads is not None:
            x[self.row].index_add_(1, torch.tensor(self.kv_heads, device=x.device), sums[0])


TOGETHER = 2
"""Heads with their own queries that are computed at once: the operators give each thread a head."""


def _tiled_heads(mask: Positions, q: Tensor, k: Tensor) -> Iterator[_TiledHeads]:
    """Cut a mask by position into tiles: for all heads, or for a few at a time where heads have their own queries."""
    begin, end = (x.cpu() for x in mask.bounds)
    if begin.dim() == 1:
        yield _TiledHeads(_tiles(begin, end, q.device))
        return
    groups = q.shape[2] // k.shape[2]
    for row in range(begin.shape[0]):
        # Heads with about equally many queries together: their tiles see about the same keys.
        order = (end[row] > begin[row]).sum(dim=1).argsort().tolist()
        for at in range(0, len(order), TOGETHER):
            heads = order[at : at + TOGETHER]
            lows, highs = begin[row, heads], end[row, heads]
            blind = (highs <= lows).T.to(q.device)
            yield _TiledHeads(_tiles(lows, highs, q.device), row, heads, tuple(head // groups for head in heads), blind)


def _tiles(begin: Tensor, end: Tensor, device: torch.device) -> list[MaskTile]:
    tiles = mask_tiles(begin, end, _query_tile(begin, end), TILE)
    return [replace(t, mask=t.mask.to(device)) if isinstance(t.mask, Tensor) else t for t in tiles]


class Tiled(HeadwiseBackend):
    """Torch operators, `TILE` keys at a time; scores and merges in the accumulation dtype."""

    @staticmethod
    def _scores(q: Tensor, k: Tensor, mask: TileMask, begin: int, scale: float) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if mask is FULL:
            return scores
        if mask is CAUSAL:
            queries = torch.arange(q.shape[2], device=q.device)
            visible = queries[:, None] >= torch.arange(begin, begin + k.shape[2], device=q.device)
        else:
            assert isinstance(mask, Tensor)
            visible = mask[..., begin : begin + k.shape[2]]
        return scores.masked_fill_(~visible, float("-inf"))

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """See HeadwiseBackend."""
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
        queries = q.to(dtype)
        for begin in range(0, k.shape[2], TILE):
            keys, values = (x[:, :, begin : begin + TILE].to(dtype) for x in (k, v))
            scores = self._scores(queries, keys, mask, begin, scale)
            tile_lse = scores.logsumexp(dim=-1)
            weights = torch.exp(scores - finite(tile_lse)[..., None])
            _merge_(out, lse, torch.matmul(weights, values), tile_lse)
        return out, lse

    def block_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """See HeadwiseBackend."""
        dtype = accumulation_dtype(q.dtype)
        queries, grads = q.to(dtype), do.to(dtype)
        delta = (grads * out.to(dtype)).sum(dim=-1, keepdim=True)
        dq = torch.zeros_like(queries)
        dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (k, v))
        for begin in range(0, k.shape[2], TILE):
            tile = slice(begin, begin + TILE)
            keys, values = k[:, :, tile].to(dtype), v[:, :, tile].to(dtype)
            weights = torch.exp(self._scores(queries, keys, mask, begin, scale) - finite(lse)[..., None])
            dv[:, :, tile] = torch.matmul(weights.transpose(-1, -2), grads)
            dscores = weights * (torch.matmul(grads, values.transpose(-1, -2)) - delta) * scale
            dk[:, :, tile] = torch.matmul(dscores.transpose(-1, -2), queries)
            dq += torch.matmul(dscores, keys)
        return dq, dk, dv

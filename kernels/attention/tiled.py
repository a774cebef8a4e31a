"""Block attention in torch operators, the merge of blocks, and masks by position taken apart for simple operators.

`HeadwiseBackend` turns an operator over plain blocks (`[B, H, T, D]`, one key head for each query head; no mask, the
causal one or a bool tensor `[Tq, Tk]` or `[H, Tq, Tk]`) into a backend: it deals out grouped heads, and cuts masks by
position into plain pieces.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.kernels.attention.masks import CAUSAL, FULL, BlockMask, Mask, Piece, Positions, pieces
from longctx.kernels.dtypes import accumulation_dtype

TILE = 1024
"""Keys of a tile: of the tiled form, and of a mask by position."""

QUERY_TILES = (256, 1024)
"""The fewest and the most queries of a tile of a mask by position: an eighth of the keys that a query sees on average,
so that a short window or document is not mostly masked, and the operators are not called for little."""

Gradients = tuple[Tensor, Tensor, Tensor]


def dense_rows(x: Tensor) -> Tensor:
    """x with a last dim that is stepped through by one, as operators and kernels assume without asking."""
    return x if x.stride(-1) == 1 else x.contiguous()


def finite(lse: Tensor) -> Tensor:
    """Rows that see nothing have weights exp(-inf - 0) = 0, not exp(-inf + inf)."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Take a block into `out [..., D]` and `lse [...]`, in place, in their dtype (the accumulation dtype)."""
    total = torch.logaddexp(lse, block_lse)
    kept = torch.exp(lse - finite(total))[..., None]
    added = torch.exp(block_lse - finite(total))[..., None]
    out.mul_(kept).add_(block_out * added)
    lse.copy_(total)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Take a block's result into a running one, in place: `out [B, T, H, D]`, `lse [B, H, T]`, accumulation dtype.

    A query that a block does not see at all (block_lse -inf) keeps what it had; one that no block saw stays 0 / -inf.
    """
    _merge_(out.transpose(1, 2), lse, block_out.transpose(1, 2), block_lse)


class HeadwiseBackend(ABC):
    """A backend over an operator for plain blocks with as many key heads as query heads."""

    @abstractmethod
    def block_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out and lse of tensors `[B, H, T, D]`."""

    @abstractmethod
    def block_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask | Tensor, scale: float
    ) -> Gradients:
        """dq, dk, dv of tensors `[B, H, T, D]`, with the global out and lse."""

    def operands(self, *tensors: Tensor) -> list[Tensor]:
        """The tensors in the dtype in which the operator computes."""
        return list(tensors)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse, shapes as in longctx.kernels.attention."""
        q, k, v = self.operands(q, k, v)
        if not isinstance(mask, Positions):
            return self._grouped_forward(q, k, v, mask, scale)
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)
        for place in _places(mask, q, k):
            queries, keys, values = place.queries(q), place.keys(k), place.keys(v)
            into, lse_into = place.queries(out), place.queries(lse.transpose(1, 2), float("-inf"))
            for piece in place.pieces:
                at, seen = slice(piece.q_begin, piece.q_end), slice(piece.k_begin, piece.k_end)
                part, part_lse = self._grouped_forward(
                    queries[:, at], keys[:, seen], values[:, seen], piece.mask, scale
                )
                merge_(into[:, at], lse_into[:, at].transpose(1, 2), part, part_lse)
            place.put_queries(out, into)
            place.put_queries(lse.transpose(1, 2), lse_into)
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> Gradients:
        """dq, dk, dv, shapes as in longctx.kernels.attention."""
        do, q, k, v, out = self.operands(do, q, k, v, out)
        if not isinstance(mask, Positions):
            return self._grouped_backward(do, q, k, v, out, lse, mask, scale)
        dtype = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v))
        for place in _places(mask, q, k):
            grads, queries, result = place.queries(do), place.queries(q), place.queries(out)
            keys, values, head_lse = place.keys(k), place.keys(v), place.queries(lse.transpose(1, 2))
            sums = place.queries(dq), place.room(dk), place.room(dv)
            for piece in place.pieces:
                at, seen = slice(piece.q_begin, piece.q_end), slice(piece.k_begin, piece.k_end)
                parts = self._grouped_backward(
                    grads[:, at],
                    queries[:, at],
                    keys[:, seen],
                    values[:, seen],
                    result[:, at],
                    head_lse[:, at].transpose(1, 2),
                    piece.mask,
                    scale,
                )
                for total, where, part in zip(sums, (at, seen, seen), parts, strict=True):
                    total[:, where] += part
            place.put_queries(dq, sums[0])
            for target, total in zip((dk, dv), sums[1:], strict=True):
                place.add_keys(target, total)
        return dq, dk, dv

    def _grouped_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
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
            part, lse[:, group::groups] = self.block_forward(queries, keys, values, mask, scale)
            out[:, :, group::groups] = part.transpose(1, 2)
        return out, lse

    def _grouped_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask | Tensor, scale: float
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
            dq_part, dk_part, dv_part = self.block_backward(
                do[heads].transpose(1, 2),
                q[heads].transpose(1, 2),
                keys,
                values,
                out[heads].transpose(1, 2),
                lse[:, group::groups].contiguous(),
                mask,
                scale,
            )
            dq[heads] = dq_part.transpose(1, 2)
            dk += dk_part.transpose(1, 2)
            dv += dv_part.transpose(1, 2)
        return dq, dk, dv


def _query_tile(begin: Tensor, end: Tensor) -> int:
    few, most = QUERY_TILES
    seen = (end - begin).clamp_min(0).double().mean().item() if begin.numel() else 0.0
    return min(max(1 << int(seen / 8).bit_length() >> 1, few), most)


@dataclass(frozen=True)
class _Place:
    """Heads of which the queries stand at the same places, or are cut together; `heads` None for all of them.

    Heads that differ are copied out, each with its rows together, and written back when they are done.
    """

    pieces: list[Piece]
    row: int = 0
    heads: list[int] | None = None
    kv_heads: tuple[int, ...] = ()
    blind: Tensor | None = None
    """`[Tq, G]` bool: the queries that see nothing, which may hold anything."""

    def _of(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        return torch.stack([x[self.row, :, head] for head in heads]).transpose(0, 1)[None]

    def queries(self, x: Tensor, blind: float = 0.0) -> Tensor:
        """`[B, Tq, H, ...]` of these heads, `[1, Tq, G, ...]`, or x itself; `blind` where a query sees nothing."""
        if self.heads is None or self.blind is None:
            return x
        part = self._of(x, self.heads)
        return part.masked_fill_(self.blind[..., None] if x.dim() == 4 else self.blind, blind)

    def keys(self, x: Tensor) -> Tensor:
        """`[B, Tk, H_kv, ...]` of the key/value heads that these read: one for each of them, or x itself."""
        return x if self.heads is None else self._of(x, self.kv_heads)

    def room(self, x: Tensor) -> Tensor:
        """Zeros for what is added to the key/value heads, or x itself."""
        return x if self.heads is None else torch.zeros_like(self.keys(x))

    def put_queries(self, x: Tensor, part: Tensor) -> None:
        """Write back what `queries` gave."""
        if self.heads is not None:
            x[self.row, :, self.heads] = part[0]

    def add_keys(self, x: Tensor, part: Tensor) -> None:
        """Add what is in `room`; several of the heads may have read one key/value head."""
        if self.heads is not None:
            x[self.row].index_add_(1, torch.tensor(self.kv_heads, device=x.device), part[0])


TOGETHER = 2
"""Heads with queries of their own that are computed at once: the operators give each thread a head."""


def _places(mask: Positions, q: Tensor, k: Tensor) -> Iterator[_Place]:
    begin, end = (x.cpu() for x in mask.bounds)
    if begin.dim() == 1:
        yield _Place(_pieces(begin, end, q.device))
        return
    groups = q.shape[2] // k.shape[2]
    for row in range(begin.shape[0]):
        # Those with about equally many queries together: their tiles see about the same.
        order = (end[row] > begin[row]).sum(dim=1).argsort().tolist()
        for at in range(0, len(order), TOGETHER):
            heads = order[at : at + TOGETHER]
            lows, highs = begin[row, heads], end[row, heads]
            blind = (highs <= lows).T.to(q.device)
            yield _Place(_pieces(lows, highs, q.device), row, heads, tuple(head // groups for head in heads), blind)


def _pieces(begin: Tensor, end: Tensor, device: torch.device) -> list[Piece]:
    cut = pieces(begin, end, _query_tile(begin, end), TILE)
    return [replace(p, mask=p.mask.to(device)) if isinstance(p.mask, Tensor) else p for p in cut]


class Tiled(HeadwiseBackend):
    """Torch operators, `TILE` keys at a time; scores and merges in the accumulation dtype."""

    @staticmethod
    def _scores(q: Tensor, k: Tensor, mask: Mask | Tensor, begin: int, scale: float) -> Tensor:
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

    def block_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
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
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask | Tensor, scale: float
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

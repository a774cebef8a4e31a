"""Block attention in torch operators, the merge of blocks, and masks by position taken apart for simple operators.

`HeadwiseBackend` turns an operator over plain blocks (`[B, H, T, D]`, one key head for each query head; no mask, the
causal one or a bool tensor) into a backend: it deals out grouped heads, and cuts masks by position into plain pieces.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from longctx.kernels.attention_masks import CAUSAL, FULL, BlockMask, Mask, Piece, Positions, pieces
from longctx.kernels.recurrence import accumulation_dtype

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
        for batch, heads, kv_heads, cut in _placed(mask, q, k):
            queries, keys, values = _alone(q[batch, :, heads], k[batch, :, kv_heads], v[batch, :, kv_heads])
            into, lse_into = out[batch, :, heads], lse[batch, heads]
            for piece in cut:
                at, seen = slice(piece.q_begin, piece.q_end), slice(piece.k_begin, piece.k_end)
                part, part_lse = self._grouped_forward(
                    queries[:, at], keys[:, seen], values[:, seen], piece.mask, scale
                )
                merge_(into[:, at], lse_into[:, :, at], part, part_lse)
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> Gradients:
        """dq, dk, dv, shapes as in longctx.kernels.attention."""
        do, q, k, v, out = self.operands(do, q, k, v, out)
        if not isinstance(mask, Positions):
            return self._grouped_backward(do, q, k, v, out, lse, mask, scale)
        dtype = accumulation_dtype(q.dtype)
        gradients = [torch.zeros(x.shape, dtype=dtype, device=q.device) for x in (q, k, v)]
        for batch, heads, kv_heads, cut in _placed(mask, q, k):
            grads, queries, result = _alone(*(x[batch, :, heads] for x in (do, q, out)))
            keys, values = _alone(*(x[batch, :, kv_heads] for x in (k, v)))
            theirs = heads, kv_heads, kv_heads
            targets = [x[batch, :, part] for x, part in zip(gradients, theirs, strict=True)]
            sums = _alone(*targets)
            head_lse = lse[batch, heads]
            for piece in cut:
                at, seen = slice(piece.q_begin, piece.q_end), slice(piece.k_begin, piece.k_end)
                parts = self._grouped_backward(
                    grads[:, at],
                    queries[:, at],
                    keys[:, seen],
                    values[:, seen],
                    result[:, at],
                    head_lse[:, :, at],
                    piece.mask,
                    scale,
                )
                for total, where, part in zip(sums, (at, seen, seen), parts, strict=True):
                    total[:, where] += part
            for target, total in zip(targets, sums, strict=True):
                # Several query heads may have read one key head: their sums went on from what was there.
                if target.data_ptr() != total.data_ptr():
                    target.copy_(total)
        dq, dk, dv = gradients
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


def _alone(*tensors: Tensor) -> tuple[Tensor, ...]:
    """One head's rows without those of others between them, which the operators would copy again for every piece."""
    return tuple(x.contiguous() if x.shape[2] == 1 else x for x in tensors)


def _query_tile(begin: Tensor, end: Tensor) -> int:
    few, most = QUERY_TILES
    seen = (end - begin).clamp_min(0).double().mean().item() if len(begin) else 0.0
    return min(max(1 << int(seen / 8).bit_length() >> 1, few), most)


def _placed(mask: Positions, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, list[Piece]]]:
    """The sequences, query heads and key heads that have the same pieces, and these."""
    begin, end = (x.cpu() for x in mask.bounds)
    groups = q.shape[2] // k.shape[2]
    if begin.dim() == 1:
        places = [(slice(None), slice(None), slice(None), begin, end)]
    else:
        places = [
            (slice(b, b + 1), slice(h, h + 1), slice(h // groups, h // groups + 1), begin[b, h], end[b, h])
            for b in range(begin.shape[0])
            for h in range(begin.shape[1])
        ]
    for batch, heads, kv_heads, lows, highs in places:
        cut = pieces(lows, highs, _query_tile(lows, highs), TILE)
        moved = [replace(p, mask=p.mask.to(q.device)) if isinstance(p.mask, Tensor) else p for p in cut]
        yield batch, heads, kv_heads, moved


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
            visible = mask[:, begin : begin + k.shape[2]]
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

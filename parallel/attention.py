"""Softmax attention over a sequence that lies over ranks: the all-gather schedule (LASP-2H, Llama 3).

K and V of all ranks are gathered, put into sequence order, and each rank attends from the queries that it holds; the
backward pass gathers again, which is cheaper than keeping them, and scatters the gradients' sums back to where the
keys live. With grouped heads the payload is small: `2 * B * T_local * H_kv * D` numbers a rank.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longctx.kernels import attention
from longctx.kernels.attention import CAUSAL, FULL, BlockMask
from longctx.kernels.precision import exact_backward, exact_forward
from longctx.kernels.recurrence import accumulation_dtype, document_ids
from longctx.parallel.collectives import all_gather, reduce_scatter
from longctx.parallel.layout import Layout

DOCUMENT_TILE = 256
"""Neighbouring documents that fit into a tile of so many tokens share one block, masked by document: a block each
would be mostly overhead."""


@dataclass(frozen=True)
class Block:
    """Local queries `[q_begin, q_end)` against the keys `[k_begin, k_end)` of the whole sequence.

    `documents` are the places in the block at which documents begin, where it holds several (then queries and keys
    are the same tokens).
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    causal: bool
    documents: tuple[int, ...] = ()

    def mask(self, device: torch.device) -> BlockMask:
        """What the block kernel takes."""
        if not self.documents:
            return CAUSAL if self.causal else FULL
        size = self.q_end - self.q_begin
        ids = document_ids(size, self.documents, device)
        return (ids[:, None] == ids[None, :]) & torch.ones(size, size, dtype=torch.bool, device=device).tril_()


def _document_pieces(layout: Layout, begin: int, end: int) -> list[tuple[int, int]]:
    """The slice `[begin, end)` cut at documents."""
    first = bisect_right(layout.cu_seqlens, begin)
    last = bisect_right(layout.cu_seqlens, end - 1)
    return list(pairwise([begin, *layout.cu_seqlens[first:last], end]))


def causal_blocks(layout: Layout) -> tuple[Block, ...]:
    """The blocks that this rank computes under the causal mask within documents; made once per batch.

    No block has an empty mask. A query's blocks follow each other, those of the earlier keys first.
    """
    return _plan(replace(layout, group=None))


# Without the group: what is kept here must not keep a process group alive.
@lru_cache(maxsize=16)
def _plan(layout: Layout) -> tuple[Block, ...]:
    blocks = []
    for part, at in zip(layout.slices, layout.local, strict=True):
        shift = at.start - part.begin
        tile: list[int] = []
        pieces = _document_pieces(layout, part.begin, part.end)
        for number, (begin, end) in enumerate(pieces):
            document = layout.document_start(begin)
            if document < begin:
                blocks.append(Block(begin + shift, end + shift, document, begin, causal=False))
            tile.append(begin)
            following = pieces[number + 1][1] if number + 1 < len(pieces) else None
            if following is None or following - tile[0] > DOCUMENT_TILE:
                inner = tuple(start - tile[0] for start in tile[1:])
                blocks.append(Block(tile[0] + shift, end + shift, tile[0], end, causal=True, documents=inner))
                tile = []
    return tuple(blocks)


def score_elements(layout: Layout) -> int:
    """Query-key pairs that this rank's queries see: what its share of the work is counted in."""
    total = 0
    for part in layout.slices:
        for begin, end in _document_pieces(layout, part.begin, part.end):
            size = end - begin
            total += size * (begin - layout.document_start(begin)) + size * (size + 1) // 2
    return total


def _in_sequence_order(k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """All ranks' k and v `[B, T, H_kv, D]`."""
    group = layout.peers
    if group is None:
        return k, v
    rows = all_gather(torch.stack([k, v]), group).wait()
    return layout.unshard(rows[:, 0].unbind()), layout.unshard(rows[:, 1].unbind())


class _AllGatherAttention(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        keys, values = _in_sequence_order(k, v, layout)
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)
        for block in causal_blocks(layout):
            queries, seen = slice(block.q_begin, block.q_end), slice(block.k_begin, block.k_end)
            attention.merge_(
                out[:, queries],
                lse[:, :, queries],
                *attention.forward(q[:, queries], keys[:, seen], values[:, seen], block.mask(q.device), scale),
            )
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout: Layout = ctx.layout
        do = grads[0]
        keys, values = _in_sequence_order(k, v, layout)
        dtype = accumulation_dtype(q.dtype)
        dq = torch.zeros_like(q, dtype=dtype)
        dkv = torch.zeros(2, *keys.shape, dtype=dtype, device=q.device)
        for block in causal_blocks(layout):
            queries, seen = slice(block.q_begin, block.q_end), slice(block.k_begin, block.k_end)
            dq_part, dk_part, dv_part = attention.backward(
                do[:, queries],
                q[:, queries],
                keys[:, seen],
                values[:, seen],
                out[:, queries],
                lse[:, :, queries],
                block.mask(q.device),
                ctx.scale,
            )
            dq[:, queries] += dq_part
            dkv[0, :, seen] += dk_part
            dkv[1, :, seen] += dv_part
        group = layout.peers
        if group is not None:
            rows = [
                torch.cat([dkv[:, :, part.begin : part.end] for part in layout.slices_of(rank)], dim=2)
                for rank in range(layout.size)
            ]
            dkv = reduce_scatter(torch.stack(rows), group).wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None


def all_gather_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Causal softmax attention within documents, `[B, T_local, H, D]`.

    Shapes: q `[B, T_local, H, D]`, k and v `[B, T_local, H_kv, D]` with H a multiple of H_kv; positions (rotary) are
    already applied.
    """
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if q.shape[1] != layout.local_length:
        raise ValueError(f"attention: {q.shape[1]} tokens, but the layout gives this rank {layout.local_length}")
    if layout.continued:
        raise ValueError("attention: the layout's first document is continued, and its earlier keys are not here")
    return _AllGatherAttention.apply(q, k, v, layout, scale)  # type: ignore[no-untyped-call]

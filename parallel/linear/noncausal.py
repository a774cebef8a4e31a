"""Bidirectional linear attention over ranks (LASP-2 without mask, Sun et al. 2025, algorithm 1).

    o_t = S^T q_t,  S = sum over the document of k_s v_s^T

Every token attends to its whole document. S is one sum per document, so a pass needs at most one all-reduce, of
`B * H * K * V` elements per document that spans several pieces of the layout: at most one document per boundary between
pieces, whatever the sequence length. Documents within one piece are computed locally; short neighbouring ones together,
with a masked score matrix.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout

TILE = 256
"""Neighbouring local documents of up to this many tokens in total are computed together."""


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of this rank's tensors: a part of one shared document, or one or more local documents."""

    rows: slice
    shared: int | None
    """Index among the shared documents; None for local documents."""
    starts: tuple[int, ...] = ()
    """Offsets at which the second and later local documents start."""


def _shared_documents(layout: Layout) -> list[int]:
    """Return the documents that span several pieces."""
    edges = range(layout.piece_length, layout.length, layout.piece_length)
    documents = (bisect_right(layout.cu_seqlens, edge) - 1 for edge in edges)
    return sorted({d for d, edge in zip(documents, edges, strict=True) if layout.cu_seqlens[d] < edge})


def _blocks(layout: Layout) -> tuple[list[_Block], int]:
    """Return this rank's blocks, and the number of shared documents."""
    shared = _shared_documents(layout)
    blocks: list[_Block] = []
    for part, local in zip(layout.slices, layout.local, strict=True):
        shift = local.start - part.begin
        tile: list[int] = []
        for begin, end in pairwise(layout.documents_in(part)):
            document = bisect_right(layout.cu_seqlens, begin) - 1
            if document in shared:
                blocks.append(_Block(slice(begin + shift, end + shift), shared.index(document)))
                tile = []
            elif tile and end - tile[0] <= TILE:
                tile.append(begin)
                first = tile[0]
                starts = tuple(start - first for start in tile[1:])
                blocks[-1] = _Block(slice(first + shift, end + shift), None, starts)
            else:
                tile = [begin]
                blocks.append(_Block(slice(begin + shift, end + shift), None))
    return blocks, len(shared)


class _NoncausalLinearAttention(torch.autograd.Function):
    """Tensors: q `[B, T, H, readers, K]`, k `[B, T, H, K]`, v `[B, T, H, V]`; readers: query heads per key head."""

    @staticmethod
    @rank_forward
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout = layout
        plan = _Plan(layout, q, k, v)
        ctx.states = plan.reduce_shared(lambda block: plan.key_value_sum(block, k, v))
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        for block in plan.blocks:
            if block.starts:
                scores, values = plan.scores(block, q, k), plan.rows(v, block)
                out[:, block.rows] = torch.einsum("bhrts,bshv->bthrv", scores, values).to(q.dtype)
            else:
                state = plan.state(block, ctx.states, k, v)
                out[:, block.rows] = torch.einsum("bthrk,bhkv->bthrv", plan.rows(q, block), state).to(q.dtype)
        return out

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        do, plan = grads[0], _Plan(ctx.layout, q, k, v)
        dstates = plan.reduce_shared(lambda block: plan.state_grad(block, q, do))
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for block in plan.blocks:
            queries, keys, values, grad = (plan.rows(x, block) for x in (q, k, v, do))
            if block.starts:
                scores = plan.scores(block, q, k)
                dscores = torch.einsum("bthrv,bshv->bhrts", grad, values) * plan.document_mask(block)
                block_grads = (
                    torch.einsum("bhrts,bshk->bthrk", dscores, keys),
                    torch.einsum("bhrts,bthrk->bshk", dscores, queries),
                    torch.einsum("bhrts,bthrv->bshv", scores, grad),
                )
            else:
                state = plan.state(block, ctx.states, k, v)
                dstate = plan.state_grad(block, q, do) if block.shared is None else dstates[block.shared]
                block_grads = (
                    torch.einsum("bthrv,bhkv->bthrk", grad, state),
                    torch.einsum("bthv,bhkv->bthk", values, dstate),
                    torch.einsum("bthk,bhkv->bthv", keys, dstate),
                )
            for x, block_grad in zip((dq, dk, dv), block_grads, strict=True):
                x[:, block.rows] = block_grad.to(x.dtype)
        return dq, dk, dv, None


class _Plan:
    """The blocks of one pass and their sums, in the accumulation dtype."""

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.group, self.dtype, self.device = layout.comm_group, accumulation_dtype(q.dtype), q.device
        self.blocks, self.shared = layout.cached("noncausal", lambda: _blocks(layout))
        self.shape = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])

    def rows(self, x: Tensor, block: _Block) -> Tensor:
        """Return a block's rows, in the accumulation dtype."""
        return x[:, block.rows].to(self.dtype)

    def reduce_shared(self, block_sum: Callable[[_Block], Tensor]) -> Tensor:
        """Sum `block_sum` over each shared document's blocks on all ranks: `[shared, B, H, K, V]`."""
        states = torch.zeros(self.shared, *self.shape, dtype=self.dtype, device=self.device)
        for block in self.blocks:
            if block.shared is not None:
                states[block.shared] += block_sum(block)
        return all_reduce(states, self.group) if self.group is not None and self.shared else states

    def key_value_sum(self, block: _Block, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bthk,bthv->bhkv", self.rows(k, block), self.rows(v, block))

    def state_grad(self, block: _Block, q: Tensor, do: Tensor) -> Tensor:
        return torch.einsum("bthrk,bthrv->bhkv", self.rows(q, block), self.rows(do, block))

    def state(self, block: _Block, states: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the state S of a block's document."""
        return self.key_value_sum(block, k, v) if block.shared is None else states[block.shared]

    def document_mask(self, block: _Block) -> Tensor:
        """Return `[t, t]`, 1 where two rows belong to one document."""
        rows = torch.arange(block.rows.stop - block.rows.start)
        documents = torch.searchsorted(torch.tensor(block.starts), rows, right=True)
        return (documents[:, None] == documents[None, :]).to(self.dtype).to(self.device)

    def scores(self, block: _Block, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bthrk,bshk->bhrts", self.rows(q, block), self.rows(k, block))
        return scores * self.document_mask(block)


def noncausal_linear_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float = 1.0) -> Tensor:
    """Compute `o_t = scale * sum_s v_s (k_s . q_t)` over all tokens s of t's document, earlier and later ones.

    Shapes: q `[B, T_local, Hq, K]`, k `[B, T_local, H, K]`, v `[B, T_local, H, V]`, Hq a multiple of H (query head h
    reads key head `h // (Hq / H)`). Returns `[B, T_local, Hq, V]` in q's dtype, summed in the accumulation dtype, zero
    for padding. For a denominator, append a value channel of ones (`longctx.kernels.linear.api.append_normalizer`).
    Differentiable in q, k and v; every rank of the layout has to call it. Raises ValueError if an argument is wrong.
    """
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and k.shape[3] == q.shape[3]
    if not fits or q.shape[:2] != k.shape[:2] or q.shape[2] % k.shape[2] or len({x.dtype for x in (q, k, v)}) > 1:
        shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(
            f"{shapes}: expected [B, T, Hq, K], [B, T, H, K] and [B, T, H, V] of one dtype, Hq a multiple of H"
        )
    layout.check_length("q", q)
    if layout.past_tokens:
        raise ValueError(
            f"the layout has past_tokens={layout.past_tokens}: bidirectional attention needs whole documents, from "
            "their first token"
        )
    grouped = (q * scale if scale != 1.0 else q).unflatten(2, (k.shape[2], -1))
    out: Tensor = _NoncausalLinearAttention.apply(grouped, k, v, layout)  # type: ignore[no-untyped-call]
    return out.flatten(2, 3)

"""Linear attention without a causal mask over a sequence that lies over ranks: every token sees its whole document.

    o_t = S^T q_t,  S = sum over the document of k_s v_s^T

One sum for each document, so that ranks need one all-reduce forward and one backward, of `B * H * K * V` numbers for
each document that lies over several pieces of the layout: at most one for each place where pieces meet, whatever the
length of the sequence. Documents inside a piece are computed there; short neighbouring ones as masked squares.
"""

from bisect import bisect_right
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
"""Neighbouring documents that fit into so many tokens are computed together."""


@dataclass(frozen=True)
class _Run:
    """Rows of this rank's tensors: of one shared document (its number among them), or of whole documents."""

    rows: slice
    shared: int | None
    starts: tuple[int, ...] = ()
    """Where whole documents begin, counted from the first row, the first one left out."""


def _shared_documents(layout: Layout) -> list[int]:
    """The documents that lie over several pieces."""
    edges = range(layout.piece_length, layout.length, layout.piece_length)
    documents = (bisect_right(layout.cu_seqlens, edge) - 1 for edge in edges)
    return sorted({d for d, edge in zip(documents, edges, strict=True) if layout.cu_seqlens[d] < edge})


def _runs(layout: Layout) -> tuple[list[_Run], int]:
    """What this rank computes, and how many documents are shared."""
    shared = _shared_documents(layout)
    runs: list[_Run] = []
    for part, at in zip(layout.slices, layout.local, strict=True):
        shift = at.start - part.begin
        tile: list[int] = []
        for begin, end in pairwise(layout.documents_in(part)):
            document = bisect_right(layout.cu_seqlens, begin) - 1
            if document in shared:
                runs.append(_Run(slice(begin + shift, end + shift), shared.index(document)))
                tile = []
            elif tile and end - tile[0] <= TILE:
                tile.append(begin)
                first = tile[0]
                inner = tuple(start - first for start in tile[1:])
                runs[-1] = _Run(slice(first + shift, end + shift), None, inner)
            else:
                tile = [begin]
                runs.append(_Run(slice(begin + shift, end + shift), None))
    return runs, len(shared)


class _Unmasked(torch.autograd.Function):
    """Tensors `[B, T, H, readers, K]` (q), `[B, T, H, K]` (k), `[B, T, H, V]` (v)."""

    @staticmethod
    @rank_forward
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout = layout
        sums = _Sums(layout, q, k, v)
        ctx.states = sums.reduced(lambda run: sums.written(run, k, v))
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        for run in sums.runs:
            if run.starts:
                out[:, run.rows] = torch.einsum("bhrts,bshv->bthrv", sums.scores(run, q, k), sums.wide(v, run)).to(
                    q.dtype
                )
            else:
                state = sums.state(run, ctx.states, k, v)
                out[:, run.rows] = torch.einsum("bthrk,bhkv->bthrv", sums.wide(q, run), state).to(q.dtype)
        return out

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        do, sums = grads[0], _Sums(ctx.layout, q, k, v)
        dstates = sums.reduced(lambda run: sums.read(run, q, do))
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for run in sums.runs:
            queries, keys, values, grad = (sums.wide(x, run) for x in (q, k, v, do))
            if run.starts:
                scores = sums.scores(run, q, k)
                dscores = torch.einsum("bthrv,bshv->bhrts", grad, values) * sums.same(run)
                parts = (
                    torch.einsum("bhrts,bshk->bthrk", dscores, keys),
                    torch.einsum("bhrts,bthrk->bshk", dscores, queries),
                    torch.einsum("bhrts,bthrv->bshv", scores, grad),
                )
            else:
                state = sums.state(run, ctx.states, k, v)
                dstate = sums.read(run, q, do) if run.shared is None else dstates[run.shared]
                parts = (
                    torch.einsum("bthrv,bhkv->bthrk", grad, state),
                    torch.einsum("bthv,bhkv->bthk", values, dstate),
                    torch.einsum("bthk,bhkv->bthv", keys, dstate),
                )
            for x, part in zip((dq, dk, dv), parts, strict=True):
                x[:, run.rows] = part.to(x.dtype)
        return dq, dk, dv, None


class _Sums:
    """What a pass adds up over documents, in the accumulation dtype."""

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.group, self.dtype, self.device = layout.peers, accumulation_dtype(q.dtype), q.device
        self.runs, self.shared = layout.cached("unmasked", lambda: _runs(layout))
        self.shape = (k.shape[0], k.shape[2], k.shape[3], v.shape[3])

    def wide(self, x: Tensor, run: _Run) -> Tensor:
        """A run's rows."""
        return x[:, run.rows].to(self.dtype)

    def reduced(self, of: Any) -> Tensor:
        """The sums of shared documents, over all ranks: `[shared, B, H, K, V]`."""
        states = torch.zeros(self.shared, *self.shape, dtype=self.dtype, device=self.device)
        for run in self.runs:
            if run.shared is not None:
                states[run.shared] += of(run)
        return all_reduce(states, self.group) if self.group is not None and self.shared else states

    def written(self, run: _Run, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bthk,bthv->bhkv", self.wide(k, run), self.wide(v, run))

    def read(self, run: _Run, q: Tensor, do: Tensor) -> Tensor:
        return torch.einsum("bthrk,bthrv->bhkv", self.wide(q, run), self.wide(do, run))

    def state(self, run: _Run, states: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.written(run, k, v) if run.shared is None else states[run.shared]

    def same(self, run: _Run) -> Tensor:
        """`[t, t]`, 1 where two rows are of one document."""
        places = torch.arange(run.rows.stop - run.rows.start)
        ids = torch.searchsorted(torch.tensor(run.starts), places, right=True)
        return (ids[:, None] == ids[None, :]).to(self.dtype).to(self.device)

    def scores(self, run: _Run, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bthrk,bshk->bhrts", self.wide(q, run), self.wide(k, run)) * self.same(run)


def unmasked_linear_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float = 1.0) -> Tensor:
    """`o_t = scale * sum_s v_s (k_s . q_t)` over the tokens s of t's document, before and after it.

    Shapes: q `[B, T_local, Hq, K]`, k `[B, T_local, H, K]`, v `[B, T_local, H, V]`, Hq a multiple of H (query head h
    reads head `h // (Hq / H)`); o `[B, T_local, Hq, V]` in q's dtype, summed in the accumulation dtype, zero for
    padding. A denominator is a value channel of ones (`longctx.kernels.linear.with_ones`). Differentiable in q, k and
    v, every rank of the layout taking part. Raises ValueError where an argument does not fit.
    """
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and k.shape[3] == q.shape[3]
    if not fits or q.shape[:2] != k.shape[:2] or q.shape[2] % k.shape[2] or len({x.dtype for x in (q, k, v)}) > 1:
        told = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(
            f"{told}: expected [B, T, Hq, K], [B, T, H, K] and [B, T, H, V] of one dtype, Hq a multiple of H"
        )
    if q.shape[1] != layout.local_length:
        raise ValueError(
            f"q has {q.shape[1]} tokens: expected the {layout.local_length} that the layout gives this rank"
        )
    if layout.past_tokens:
        raise ValueError("the layout's first document is continued, and its earlier tokens are not here")
    grouped = (q * scale if scale != 1.0 else q).unflatten(2, (k.shape[2], -1))
    out: Tensor = _Unmasked.apply(grouped, k, v, layout)  # type: ignore[no-untyped-call]
    return out.flatten(2, 3)

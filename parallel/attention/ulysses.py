"""Ulysses (Jacobs et al. 2023): exchange all heads of some tokens for some heads of all tokens, by all-to-all.

One all-to-all for q, k and v together and one for the output, in the forward and in the backward pass. Each of U ranks
gets `H / U` query heads and the key/value heads that these read; where there are fewer of these than ranks, several
ranks get the same one, and its gradients are added when they return.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.dtypes import accumulation_dtype
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_to_all


def check_heads(heads: int, size: int) -> None:
    """Raise ValueError where the query heads do not divide over `size` ranks."""
    if heads % size:
        common = math.gcd(heads, size)
        instead = f"'ulysses-ring' with groups of {common} ranks" if common > 1 else "'ring' or 'all-gather'"
        raise ValueError(
            f"Ulysses: {heads} query heads do not divide over {size} ranks ({heads} = {heads // size} x {size} + "
            f"{heads % size}); use {instead} instead"
        )


@dataclass(frozen=True)
class HeadPartition:
    """The heads that each of `size` ranks computes, of `queries` query heads and `keys` key/value heads."""

    queries: int
    keys: int
    size: int

    def __post_init__(self) -> None:
        check_heads(self.queries, self.size)

    def of_queries(self, rank: int) -> slice:
        """Return a rank's query heads."""
        heads = self.queries // self.size
        return slice(rank * heads, (rank + 1) * heads)

    def of_keys(self, rank: int) -> slice:
        """Return the key/value heads that a rank's query heads read."""
        heads, group = self.of_queries(rank), self.queries // self.keys
        return slice(heads.start // group, (heads.stop - 1) // group + 1)

    @property
    def most_keys(self) -> int:
        """Key/value heads of the rank that has most."""
        return max(self.of_keys(rank).stop - self.of_keys(rank).start for rank in range(self.size))

    def keys_read(self, rank: int) -> list[int]:
        """Return the key/value head that each of a rank's query heads reads, counted from the rank's first."""
        heads, group = self.of_queries(rank), self.queries // self.keys
        return [head // group - heads.start // group for head in range(heads.start, heads.stop)]

    def expanded(self, rank: int) -> list[int] | None:
        """Return key/value heads to repeat, so that each is read equally often by the rank's query heads; None where
        each is already."""
        read = self.keys_read(rank)
        counts = [read.count(head) for head in range(read[-1] + 1)]
        if len(set(counts)) == 1:
            return None
        return read[:: math.gcd(*counts)]


class _ScatterHeads(torch.autograd.Function):
    """q, k, v from all heads of this rank's rows, `[B, T_local, heads, D]`, to its heads of `U T_local` rows."""

    @staticmethod
    @rank_forward
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: HeadPartition, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        rank = group.rank()
        ctx.heads, ctx.group, ctx.shapes = heads, group, (q.shape, k.shape, v.shape)
        sent = []
        for r in range(heads.size):
            queries, keys = heads.of_queries(r), heads.of_keys(r)
            sent.append(torch.cat([q[:, :, queries].flatten(), k[:, :, keys].flatten(), v[:, :, keys].flatten()]))
        shapes = _shapes(heads, rank, *ctx.shapes)
        sizes = [shape.numel() for shape in shapes]
        received = all_to_all(sent, [sum(sizes)] * heads.size, group).wait()
        split = [flat.split(sizes) for flat in received]
        return tuple(torch.cat([x[i].view(shape) for x in split], dim=1) for i, shape in enumerate(shapes))

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads: HeadPartition = ctx.heads
        shapes = [_shapes(heads, r, *ctx.shapes) for r in range(heads.size)]
        # q may have other rows than k and v: the pairs that routing selected.
        by_rank = zip(*(g.chunk(heads.size, dim=1) for g in grads), strict=True)
        sent = [torch.cat([g.flatten() for g in of_rank]) for of_rank in by_rank]
        received = all_to_all(sent, [sum(s.numel() for s in of_rank) for of_rank in shapes], ctx.group).wait()
        dtype = accumulation_dtype(grads[0].dtype)
        dq = grads[0].new_empty(ctx.shapes[0])
        dk, dv = (grads[0].new_zeros(shape, dtype=dtype) for shape in ctx.shapes[1:])
        for r, (flat, of_rank) in enumerate(zip(received, shapes, strict=True)):
            q, k, v = (x.view(s) for x, s in zip(flat.split([s.numel() for s in of_rank]), of_rank, strict=True))
            dq[:, :, heads.of_queries(r)] = q
            # Several ranks may have read one key/value head.
            dk[:, :, heads.of_keys(r)] += k
            dv[:, :, heads.of_keys(r)] += v
        return dq, dk.to(grads[1].dtype), dv.to(grads[2].dtype), None, None


def _shapes(heads: HeadPartition, rank: int, q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[torch.Size, ...]:
    """Return the shapes of q, k and v that a rank receives from each rank."""
    queries, keys = heads.of_queries(rank), heads.of_keys(rank)
    counts = (queries.stop - queries.start, keys.stop - keys.start, keys.stop - keys.start)
    return tuple(torch.Size((*x[:2], n, x[3])) for x, n in zip((q, k, v), counts, strict=True))


def _gather_heads(x: Tensor, size: int, group: ProcessGroup) -> Tensor:
    sent = list(x.chunk(size, dim=1))
    received = all_to_all(sent, [sent[0].numel()] * size, group).wait()
    return torch.cat([flat.view(sent[0].shape) for flat in received], dim=2)


def scatter_rows_of(x: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """Exchange all heads of this rank's rows, `[B, T_local, H, D]`, for its heads of all ranks' rows; no gradient."""
    sent = list(x.chunk(size, dim=2))
    received = all_to_all(sent, [sent[0].numel()] * size, group).wait()
    return torch.cat([flat.view(sent[0].shape) for flat in received], dim=1)


class _GatherHeads(torch.autograd.Function):
    """From its heads of all ranks' rows, `[B, U T_local, H / U, V]`, to all heads of its rows, `[B, T_local, H, V]`."""

    @staticmethod
    @rank_forward
    def forward(ctx: Any, x: Tensor, size: int, group: ProcessGroup) -> Tensor:
        ctx.size, ctx.group = size, group
        return _gather_heads(x, size, group)

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scatter_rows_of(grads[0], ctx.size, ctx.group), None, None


def scatter_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: HeadPartition, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q `[B, U T_local, H / U, K]`, and k and v of the heads that these read, for all ranks' rows in rank order.

    Where query heads do not read the key/value heads equally often, these are repeated, so that groups are equal.
    """
    q, k, v = _ScatterHeads.apply(q, k, v, heads, group)  # type: ignore[no-untyped-call]
    index = heads.expanded(group.rank())
    if index is not None:
        k, v = k[:, :, index], v[:, :, index]
    return q, k, v


def gather_heads(out: Tensor, heads: HeadPartition, group: ProcessGroup) -> Tensor:
    """Return all heads of this rank's rows, `[B, T_local, H, V]`, from the outputs: the inverse of `scatter_heads`."""
    result: Tensor = _GatherHeads.apply(out, heads.size, group)  # type: ignore[no-untyped-call]
    return result

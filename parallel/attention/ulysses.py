"""Ulysses (Jacobs et al. 2023): ranks change between holding all heads of some tokens and some heads of all tokens.

One all-to-all each for q, k and v together and for the output, forward and backward. A rank gets `H / U` query heads
and the key/value heads that these read: where there are fewer of them than ranks, several ranks get the same one, and
its gradients are added where they come back.
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
    """Raise ValueError where `size` ranks cannot divide the query heads."""
    if heads % size:
        near = [d for d in range(1, size + 1) if heads % d == 0]
        raise ValueError(
            f"Ulysses: {heads} query heads do not divide over {size} ranks ({heads} = {heads // size} x {size} + "
            f"{heads % size}); take {near[-1]} of them for Ulysses and the ring for the rest"
        )


@dataclass(frozen=True)
class HeadPartition:
    """Which heads each of `size` ranks computes, of `queries` query heads over `keys` key/value heads."""

    queries: int
    keys: int
    size: int

    def __post_init__(self) -> None:
        check_heads(self.queries, self.size)

    def of_queries(self, rank: int) -> slice:
        """A rank's query heads."""
        each = self.queries // self.size
        return slice(rank * each, (rank + 1) * each)

    def of_keys(self, rank: int) -> slice:
        """The key/value heads that these read."""
        mine, share = self.of_queries(rank), self.queries // self.keys
        return slice(mine.start // share, (mine.stop - 1) // share + 1)

    @property
    def most_keys(self) -> int:
        """The key/value heads of the rank that has most."""
        return max(self.of_keys(rank).stop - self.of_keys(rank).start for rank in range(self.size))

    def readers(self, rank: int) -> list[int]:
        """For each of a rank's query heads the key/value head that it reads, counted from the rank's first."""
        mine, share = self.of_queries(rank), self.queries // self.keys
        return [head // share - mine.start // share for head in range(mine.start, mine.stop)]

    def expanded(self, rank: int) -> list[int] | None:
        """Key/value heads to compute with, where query heads do not read those of the rank equally often; else None."""
        readers = self.readers(rank)
        counts = [readers.count(head) for head in range(readers[-1] + 1)]
        if len(set(counts)) == 1:
            return None
        return readers[:: math.gcd(*counts)]


class _ScatterHeads(torch.autograd.Function):
    """q, k, v of all heads and this rank's rows `[B, T_r, heads, D]`, to its heads and the rows of all ranks, U T_r."""

    @staticmethod
    @rank_forward
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: HeadPartition, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        rank = torch.distributed.get_rank(group)
        ctx.heads, ctx.group, ctx.shapes = heads, group, (q.shape, k.shape, v.shape)
        parts = []
        for r in range(heads.size):
            queries, keys = heads.of_queries(r), heads.of_keys(r)
            parts.append(torch.cat([q[:, :, queries].flatten(), k[:, :, keys].flatten(), v[:, :, keys].flatten()]))
        mine = _shapes(heads, rank, *ctx.shapes)
        each = sum(shape.numel() for shape in mine)
        got = all_to_all(parts, [each] * heads.size, group).wait()
        split = [x.split([shape.numel() for shape in mine]) for x in got]
        return tuple(torch.cat([x[i].view(shape) for x in split], dim=1) for i, shape in enumerate(mine))

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads: HeadPartition = ctx.heads
        shapes = [_shapes(heads, r, *ctx.shapes) for r in range(heads.size)]
        # q may have other rows than k and v: pairs that were routed.
        of_ranks = list(zip(*(g.chunk(heads.size, dim=1) for g in grads), strict=True))
        parts = [torch.cat([g.flatten() for g in each]) for each in of_ranks]
        got = all_to_all(parts, [sum(s.numel() for s in each) for each in shapes], ctx.group).wait()
        dtype = accumulation_dtype(grads[0].dtype)
        dq = grads[0].new_empty(ctx.shapes[0])
        dk, dv = (grads[0].new_zeros(shape, dtype=dtype) for shape in ctx.shapes[1:])
        for r, (flat, each) in enumerate(zip(got, shapes, strict=True)):
            q, k, v = (x.view(s) for x, s in zip(flat.split([s.numel() for s in each]), each, strict=True))
            dq[:, :, heads.of_queries(r)] = q
            # Several ranks may have read one head.
            dk[:, :, heads.of_keys(r)] += k
            dv[:, :, heads.of_keys(r)] += v
        return dq, dk.to(grads[1].dtype), dv.to(grads[2].dtype), None, None


def _shapes(heads: HeadPartition, rank: int, q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[torch.Size, ...]:
    """What a rank gets of q, k and v from each rank."""
    queries, keys = heads.of_queries(rank), heads.of_keys(rank)
    counts = (queries.stop - queries.start, keys.stop - keys.start, keys.stop - keys.start)
    return tuple(torch.Size((*x[:2], n, x[3])) for x, n in zip((q, k, v), counts, strict=True))


def _gather_heads(x: Tensor, size: int, group: ProcessGroup) -> Tensor:
    parts = list(x.chunk(size, dim=1))
    got = all_to_all(parts, [parts[0].numel()] * size, group).wait()
    return torch.cat([part.view(parts[0].shape) for part in got], dim=2)


def scatter_rows_of(x: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """All heads and this rank's rows, `[B, T_r, H, D]`, to its heads and all ranks' rows; without gradient."""
    parts = list(x.chunk(size, dim=2))
    got = all_to_all(parts, [parts[0].numel()] * size, group).wait()
    return torch.cat([part.view(parts[0].shape) for part in got], dim=1)


class _GatherHeads(torch.autograd.Function):
    """`[B, U T_r, H / U, V]` of all ranks' rows and this rank's heads, to its rows and all heads `[B, T_r, H, V]`."""

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
    """q `[B, U T_r, H / U, K]`, k and v of the heads that these read, of all ranks' rows in the order of ranks.

    Where query heads do not read the key/value heads equally often, these are repeated, so that they group.
    """
    q, k, v = _ScatterHeads.apply(q, k, v, heads, group)  # type: ignore[no-untyped-call]
    index = heads.expanded(torch.distributed.get_rank(group))
    if index is not None:
        k, v = k[:, :, index], v[:, :, index]
    return q, k, v


def gather_heads(out: Tensor, heads: HeadPartition, group: ProcessGroup) -> Tensor:
    """The inverse, for the outputs: `[B, T_r, H, V]` of this rank's rows."""
    result: Tensor = _GatherHeads.apply(out, heads.size, group)  # type: ignore[no-untyped-call]
    return result

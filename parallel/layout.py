"""How a packed sequence lies over context-parallel ranks.

A sequence of T tokens over W ranks: `contiguous` (rank r holds slice r of W) or `zigzag` (slices r and 2W-1-r of 2W,
which balances causal work). Everything is answered on the host, once per batch; nothing here communicates. A layer
takes the layout and nothing else about ranks.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.arguments import checked_cu_seqlens
from longctx.parallel.mesh import Mesh

Order = Literal["contiguous", "zigzag"]


@dataclass(frozen=True)
class Slice:
    """Tokens `begin` to `end` of the whole sequence, which lie together on one rank."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """Tokens in the slice."""
        return self.end - self.begin


def slices_per_rank(order: Order, size: int) -> int:
    """A rank holds 2 slices in zigzag order and 1 in contiguous order; alone, it holds the whole sequence."""
    return 2 if order == "zigzag" and size > 1 else 1


def check_divisible(length: int, order: Order, size: int) -> None:
    """Raise ValueError, with the arithmetic, where `length` tokens cannot be split over `size` ranks."""
    pieces = size * slices_per_rank(order, size)
    if length < 1 or length % pieces:
        below = length // pieces * pieces
        near = f"{below} or {below + pieces}" if below else f"{pieces}"
        raise ValueError(
            f"a sequence of {length} tokens does not split over {size} ranks in {order} order: it needs a multiple of "
            f"{pieces} tokens ({size} ranks x {pieces // size} slices), for example {near}"
        )


@dataclass(frozen=True)
class Layout:
    """One packed sequence over the ranks of a context-parallel group, as one of them sees it.

    `cu_seqlens` are the cumulated lengths of the documents, `0 = c_0 < c_1 < ... < c_N = T`. `group` is None where
    one rank holds the whole sequence. `continued` counts the tokens of the first document that an earlier sequence
    held: where it is not 0, that document does not begin here, and a state may come in from before.
    """

    cu_seqlens: tuple[int, ...]
    order: Order = "contiguous"
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    continued: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", checked_cu_seqlens(self.cu_seqlens))
        if self.order not in ("contiguous", "zigzag"):
            raise ValueError(f"order must be 'contiguous' or 'zigzag', not {self.order!r}")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size} ranks")
        if self.continued < 0:
            raise ValueError(f"continued must be a number of tokens, not {self.continued}")
        check_divisible(self.length, self.order, self.size)

    @classmethod
    def on(cls, mesh: Mesh, cu_seqlens: Sequence[int], order: Order) -> "Layout":
        """The layout of a sequence over the cp axis of a mesh, for this rank."""
        group = mesh.cp_group if mesh.cp > 1 else None
        return cls(tuple(cu_seqlens), order, mesh.cp, mesh.cp_rank, group)

    @property
    def peers(self) -> ProcessGroup | None:
        """The group to exchange with, None where one rank holds everything.

        Raises ValueError for a layout over several ranks that was made without their group, to be looked at.
        """
        if self.size > 1 and self.group is None:
            raise ValueError(f"this layout is over {self.size} ranks and has no process group to reach them by")
        return self.group if self.size > 1 else None

    @property
    def length(self) -> int:
        """T: the tokens of the whole sequence."""
        return self.cu_seqlens[-1]

    @property
    def local_length(self) -> int:
        """The tokens that this rank holds."""
        return self.length // self.size

    @property
    def pieces(self) -> int:
        """Slices of the whole sequence."""
        return self.size * slices_per_rank(self.order, self.size)

    def owner(self, number: int) -> tuple[int, int]:
        """Rank that holds slice `number` (in sequence order), and its place among that rank's slices."""
        if number < self.size:
            return number, 0
        return self.pieces - 1 - number, 1

    def numbers(self, rank: int) -> tuple[int, ...]:
        """The slices of a rank, as numbers in sequence order."""
        return (rank,) if self.pieces == self.size else (rank, self.pieces - 1 - rank)

    def slices_of(self, rank: int) -> tuple[Slice, ...]:
        """What a rank holds, in the order in which it lies there."""
        step = self.length // self.pieces
        return tuple(Slice(n * step, (n + 1) * step) for n in self.numbers(rank))

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """What this rank holds, in the order in which it lies here."""
        return self.slices_of(self.rank)

    @cached_property
    def local(self) -> tuple[slice, ...]:
        """Where each of `slices` lies in this rank's tensors."""
        step = self.length // self.pieces
        return tuple(slice(i * step, (i + 1) * step) for i in range(len(self.slices)))

    def starts(self, part: Slice) -> tuple[int, ...]:
        """The places of a slice at which documents begin, counted from its own start."""
        first, last = bisect_left(self.cu_seqlens, part.begin), bisect_left(self.cu_seqlens, part.end)
        if first == 0 and self.continued:
            first = 1
        return tuple(c - part.begin for c in self.cu_seqlens[first:last])

    def document_start(self, position: int) -> int:
        """Where the document of a token begins."""
        return self.cu_seqlens[bisect_right(self.cu_seqlens, position) - 1]

    @cached_property
    def positions(self) -> Tensor:
        """The place of each of this rank's tokens in its own document: `[local_length]` int64, on the CPU."""
        bounds = torch.tensor(self.cu_seqlens)
        tokens = self.shard(torch.arange(self.length), dim=0)
        begins = bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
        return torch.where(begins == 0, tokens + self.continued, tokens - begins)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a whole tensor, along `dim`."""
        if x.shape[dim] != self.length:
            raise ValueError(f"shard: dimension {dim} has {x.shape[dim]} tokens, the layout {self.length}")
        return torch.cat([x.narrow(dim, part.begin, part.size) for part in self.slices], dim=dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole tensor, from every rank's part in the order of ranks."""
        if len(parts) != self.size:
            raise ValueError(f"unshard: {len(parts)} parts for {self.size} ranks")
        step = self.length // self.pieces
        owners = map(self.owner, range(self.pieces))
        return torch.cat([parts[rank].narrow(dim, place * step, step) for rank, place in owners], dim=dim)

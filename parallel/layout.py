"""Sequence layout: how a packed sequence is sharded over context-parallel ranks.

A sequence of T tokens over W ranks is cut into equal pieces, which the order assigns to ranks: `contiguous` (piece r of
W to rank r), `zigzag` (pieces r and 2W-1-r of 2W, which balances causal work within one document; Megatron's order) or
`balanced` (several pieces per rank, assigned so that ranks have equal causal work on packed documents:
`longctx.parallel.balance`). Every rank holds the same number of tokens. If T is not divisible, the last pieces end in
padding or are all padding: rows that belong to no document, that no layer computes, and whose outputs and gradients are
zero.

Everything is computed on the host, once per batch, without communication. The layout is all that a layer receives about
ranks.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.device import DeviceCopy
from longctx.kernels.linear.checks import checked_cu_seqlens
from longctx.kernels.linear.recurrence import Segment
from longctx.parallel.balance import balanced_owners
from longctx.parallel.link_speeds import ASSUMED, Speeds
from longctx.parallel.mesh import Grid, Mesh

Order = Literal["contiguous", "zigzag", "balanced"]
STATE_SCHEDULES = ("all-gather", "ring", "tree")
"""Schedules that exchange the states of linear layers: `longctx.parallel.linear.state_exchange`."""


@dataclass(frozen=True)
class Slice:
    """Tokens `[begin, end)` of the whole sequence, contiguous on one rank."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """Tokens in the slice."""
        return self.end - self.begin


@dataclass(frozen=True)
class Layout:
    """One packed sequence over the ranks of a context-parallel group, from the view of one rank.

    `cu_seqlens` are the cumulative document lengths, `0 = c_0 < c_1 < ... < c_N = T`. `group` is None if one rank holds
    the whole sequence. `past_tokens` is the number of tokens of the first document that earlier calls have consumed: if
    not 0, that document does not start here, and layers may take an initial state.
    """

    cu_seqlens: tuple[int, ...]
    order: Order = "contiguous"
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    past_tokens: int = 0
    grid: Grid | None = None
    """The ranks as Ulysses groups x rings, if they are split."""
    attention: str = "auto"
    """The schedule of softmax layers: one of `longctx.parallel.attention.SCHEDULES`, `auto` for the cheapest."""
    states: str = "all-gather"
    """The state schedule of linear layers: one of STATE_SCHEDULES."""
    speeds: Speeds = ASSUMED
    """Speeds for the cost model of `auto`; the same on every rank."""
    sequence: int = 0
    """Index of the sequence in its stream, a key of the counter-based random numbers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", checked_cu_seqlens(self.cu_seqlens))
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, not {self.order!r}")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size} ranks")
        if self.states not in STATE_SCHEDULES:
            raise ValueError(f"states must be one of {', '.join(STATE_SCHEDULES)}, not {self.states!r}")
        if self.past_tokens < 0:
            raise ValueError(f"past_tokens must be a non-negative number of tokens, not {self.past_tokens}")

    @classmethod
    def on(
        cls,
        mesh: Mesh,
        cu_seqlens: Sequence[int],
        order: Order,
        *,
        attention: str = "auto",
        states: str = "all-gather",
        speeds: Speeds = ASSUMED,
        sequence: int = 0,
    ) -> "Layout":
        """Return the layout of a sequence over the cp axis of a mesh, for this rank."""
        cp, bounds = mesh.cp, tuple(cu_seqlens)
        return cls(bounds, order, cp.size, cp.rank, cp.group, 0, mesh.grid, attention, states, speeds, sequence)

    def for_rank(self, rank: int) -> "Layout":
        """Return the same layout for another rank, without process groups: for inspection, not for computing."""
        return replace(self, rank=rank, group=None, grid=None)

    @property
    def comm_group(self) -> ProcessGroup | None:
        """The process group for this layout's collectives; None if one rank holds the whole sequence.

        Raises ValueError for a layout over several ranks without a process group (see `for_rank`).
        """
        if self.size > 1 and self.group is None:
            raise ValueError(
                f"this layout is over {self.size} ranks and has no process group: use Layout.on, or pass group"
            )
        return self.group if self.size > 1 else None

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        """Return `make()`, computed at the first call with this key: plans that all layers share, one set per batch."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    @cached_property
    def _cached(self) -> dict[object, Any]:
        return {}

    @property
    def length(self) -> int:
        """T: the tokens of the whole sequence, without padding."""
        return self.cu_seqlens[-1]

    @cached_property
    def owners(self) -> tuple[int, ...]:
        """The rank of each piece, in sequence order."""
        ranks = range(self.size)
        if self.size == 1 or self.order == "contiguous":
            return tuple(ranks)
        return (*ranks, *reversed(ranks)) if self.order == "zigzag" else balanced_owners(self.cu_seqlens, self.size)

    @property
    def pieces(self) -> int:
        """The number of pieces of the whole sequence."""
        return len(self.owners)

    @property
    def piece_length(self) -> int:
        """Rows per piece, padding included."""
        return -(-self.length // self.pieces)

    @property
    def local_length(self) -> int:
        """Rows per rank, padding included."""
        return self.piece_length * (self.pieces // self.size)

    @cached_property
    def _pieces_by_rank(self) -> tuple[tuple[int, ...], ...]:
        pieces: list[list[int]] = [[] for _ in range(self.size)]
        for number, rank in enumerate(self.owners):
            pieces[rank].append(number)
        return tuple(map(tuple, pieces))

    def pieces_of(self, rank: int) -> tuple[int, ...]:
        """Return the piece numbers (in sequence order) of a rank, ascending."""
        return self._pieces_by_rank[rank]

    @cached_property
    def piece_locations(self) -> tuple[tuple[int, int], ...]:
        """For each piece, in sequence order: (rank that holds it, index among that rank's pieces)."""
        return tuple((rank, self._pieces_by_rank[rank].index(number)) for number, rank in enumerate(self.owners))

    def piece(self, number: int) -> Slice:
        """Return the tokens of a piece, without its padding."""
        step, length = self.piece_length, self.length
        return Slice(min(number * step, length), min((number + 1) * step, length))

    def slices_of(self, rank: int) -> tuple[Slice, ...]:
        """Return the slices of a rank, in local order."""
        return tuple(map(self.piece, self.pieces_of(rank)))

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of this rank, in local order."""
        return self.slices_of(self.rank)

    @cached_property
    def local(self) -> tuple[slice, ...]:
        """The rows of each of `slices` in this rank's tensors."""
        step = self.piece_length
        return tuple(slice(i * step, i * step + part.size) for i, part in enumerate(self.slices))

    @cached_property
    def padding(self) -> tuple[slice, ...]:
        """The padding rows of this rank's tensors."""
        step = self.piece_length
        rows = (slice(at.stop, (i + 1) * step) for i, at in enumerate(self.local))
        return tuple(gap for gap in rows if gap.start < gap.stop)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """This rank's pieces as segments of its tensors, for recurrences and convolutions."""
        parts = zip(self.local, self.slices, strict=True)
        return tuple(Segment(local.start, local.stop, self.starts(part)) for local, part in parts)

    def check_length(self, name: str, x: Tensor) -> None:
        """Raise ValueError where `x [B, T_local, ...]` does not have this rank's number of tokens, padding included."""
        if x.dim() > 1 and x.shape[1] != self.local_length:
            raise ValueError(
                f"{name} has {x.shape[1]} tokens: expected {self.local_length}, this rank's share of the layout"
            )

    def zero_padding_(self, x: Tensor) -> Tensor:
        """Zero the padding rows of `x [B, T_local, ...]` in place."""
        for gap in self.padding:
            x[:, gap] = 0
        return x

    def starts(self, part: Slice) -> tuple[int, ...]:
        """Return the offsets within a slice at which documents start."""
        first, last = bisect_left(self.cu_seqlens, part.begin), bisect_left(self.cu_seqlens, part.end)
        if first == 0 and self.past_tokens:
            first = 1
        return tuple(c - part.begin for c in self.cu_seqlens[first:last])

    def document_start(self, position: int) -> int:
        """Return the first token of the document that contains a token."""
        return self.cu_seqlens[bisect_right(self.cu_seqlens, position) - 1]

    def document_end(self, position: int) -> int:
        """Return the end (exclusive) of the document that contains a token."""
        return self.cu_seqlens[bisect_right(self.cu_seqlens, position)]

    def documents_in(self, part: Slice) -> list[int]:
        """Split a slice at document starts: its begin, the document starts inside, its end; [] for an empty slice."""
        if part.size == 0:
            return []
        first = bisect_right(self.cu_seqlens, part.begin)
        last = bisect_right(self.cu_seqlens, part.end - 1)
        return [part.begin, *self.cu_seqlens[first:last], part.end]

    @cached_property
    def tokens(self) -> Tensor:
        """The token index in the whole sequence of each of this rank's rows, `[local_length]` int64, -1 for padding."""
        return self.shard(torch.arange(self.length), dim=0, fill=-1)

    @cached_property
    def positions(self) -> Tensor:
        """Positions of this rank's rows in their documents, `[local_length]` int64 on the CPU, 0 for padding."""
        bounds = torch.tensor(self.cu_seqlens)
        begins = bounds[torch.searchsorted(bounds, self.tokens.clamp(min=0), right=True) - 1]
        positions = torch.where(begins == 0, self.tokens + self.past_tokens, self.tokens - begins)
        return torch.where(self.tokens < 0, 0, positions)

    def on_device(self, name: Literal["tokens", "positions"], device: torch.device) -> Tensor:
        """Return `tokens` or `positions` on a device: copied once for all layers, without making the host wait."""
        copy: DeviceCopy = self.cached((name, device), lambda: DeviceCopy(getattr(self, name), device))
        return copy.tensor()

    def shard(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """Return this rank's rows of a whole tensor along `dim`; padding rows are `fill`."""
        if x.shape[dim] != self.length:
            raise ValueError(f"shard: dim {dim} has {x.shape[dim]} tokens, the layout {self.length}")
        parts = []
        for part in self.slices:
            parts.append(x.narrow(dim, part.begin, part.size))
            missing = list(x.shape)
            missing[dim] = self.piece_length - part.size
            if missing[dim]:
                parts.append(x.new_full(missing, fill))
        return torch.cat(parts, dim=dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the whole tensor, without padding, from the shards of all ranks in rank order."""
        if len(parts) != self.size:
            raise ValueError(f"unshard: {len(parts)} parts for {self.size} ranks")
        step = self.piece_length
        pieces = [parts[rank].narrow(dim, index * step, step) for rank, index in self.piece_locations]
        return torch.cat(pieces, dim=dim).narrow(dim, 0, self.length)

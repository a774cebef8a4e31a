"""How a packed sequence lies over context-parallel ranks.

A sequence of T tokens over W ranks is cut into equal pieces, and the order says whose they are: `contiguous` (rank r
holds piece r of W), `zigzag` (pieces r and 2W-1-r of 2W, which balances causal work within one document; Megatron's)
or `balanced` (several pieces a rank, given out so that the causal work of packed documents is the same everywhere:
`longctx.parallel.balance`). Every rank holds equally many tokens. Where T does not divide, the last pieces end in
padding, or are all padding: rows that belong to no document, that no layer computes, and whose outputs and gradients
are zero.

Everything is answered on the host, once per batch; nothing here communicates. A layer takes the layout and nothing else
about ranks.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.kernels.linear.checks import checked_cu_seqlens
from longctx.parallel.balance import balanced_owners
from longctx.parallel.link_speeds import ASSUMED, Speeds
from longctx.parallel.mesh import Grid, Mesh

Order = Literal["contiguous", "zigzag", "balanced"]
STATE_SCHEDULES = ("all-gather", "ring", "tree")
"""How the states of linear layers travel: `longctx.parallel.linear.state_exchange`."""


@dataclass(frozen=True)
class Slice:
    """Tokens `begin` to `end` of the whole sequence, which lie together on one rank."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        """Tokens in the slice."""
        return self.end - self.begin


@dataclass(frozen=True)
class Layout:
    """One packed sequence over the ranks of a context-parallel group, as one of them sees it.

    `cu_seqlens` are the cumulated lengths of the documents, `0 = c_0 < c_1 < ... < c_N = T`. `group` is None where
    one rank holds the whole sequence. `past_tokens` counts the tokens of the first document that an earlier sequence
    held: where it is not 0, that document does not begin here, and a state may come in from before.
    """

    cu_seqlens: tuple[int, ...]
    order: Order = "contiguous"
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    past_tokens: int = 0
    grid: Grid | None = None
    """How the ranks divide into Ulysses groups and rings, where they do."""
    attention: str = "auto"
    """The schedule of softmax layers: one of `longctx.parallel.attention.SCHEDULES`, `auto` for the cheapest."""
    states: str = "all-gather"
    """How the states of linear layers travel: one of STATE_SCHEDULES."""
    speeds: Speeds = ASSUMED
    """What `auto` reckons with; the same on every rank."""
    sequence: int = 0
    """The number of the sequence in its stream, which numbers of chance depend on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", checked_cu_seqlens(self.cu_seqlens))
        if self.order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}, not {self.order!r}")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not one of {self.size} ranks")
        if self.states not in STATE_SCHEDULES:
            raise ValueError(f"states must be one of {', '.join(STATE_SCHEDULES)}, not {self.states!r}")
        if self.past_tokens < 0:
            raise ValueError(f"past_tokens must be a number of tokens, not {self.past_tokens}")

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
        """The layout of a sequence over the cp axis of a mesh, for this rank."""
        cp, bounds = mesh.cp, tuple(cu_seqlens)
        return cls(bounds, order, cp.size, cp.rank, cp.group, 0, mesh.grid, attention, states, speeds, sequence)

    def seen_by(self, rank: int) -> "Layout":
        """The same layout as another rank of the group sees it, without the group: to be looked at."""
        return replace(self, rank=rank, group=None, grid=None)

    @property
    def peers(self) -> ProcessGroup | None:
        """The group to exchange with, None where one rank holds everything.

        Raises ValueError for a layout over several ranks that was made without their group, to be looked at.
        """
        if self.size > 1 and self.group is None:
            raise ValueError(f"this layout is over {self.size} ranks and has no process group to reach them by")
        return self.group if self.size > 1 else None

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call with this key: plans that all layers share, one set a batch."""
        if key not in self._cached:
            self._cached[key] = make()
        return self._cached[key]

    @cached_property
    def _cached(self) -> dict[object, Any]:
        return {}

    @property
    def length(self) -> int:
        """T: the tokens of the whole sequence, padding not counted."""
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
        """Pieces of the whole sequence."""
        return len(self.owners)

    @property
    def piece_length(self) -> int:
        """The rows of a piece."""
        return -(-self.length // self.pieces)

    @property
    def local_length(self) -> int:
        """The rows that every rank holds, padding included."""
        return self.piece_length * (self.pieces // self.size)

    @cached_property
    def _held(self) -> tuple[tuple[int, ...], ...]:
        held: list[list[int]] = [[] for _ in range(self.size)]
        for number, rank in enumerate(self.owners):
            held[rank].append(number)
        return tuple(map(tuple, held))

    def numbers(self, rank: int) -> tuple[int, ...]:
        """The pieces of a rank, as numbers in sequence order, ascending."""
        return self._held[rank]

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """For each piece in sequence order the rank that holds it, and its place among that rank's pieces."""
        return tuple((rank, self._held[rank].index(number)) for number, rank in enumerate(self.owners))

    def piece(self, number: int) -> Slice:
        """The tokens of a piece, without its padding."""
        step, length = self.piece_length, self.length
        return Slice(min(number * step, length), min((number + 1) * step, length))

    def slices_of(self, rank: int) -> tuple[Slice, ...]:
        """What a rank holds, in the order in which it lies there."""
        return tuple(map(self.piece, self.numbers(rank)))

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """What this rank holds, in the order in which it lies here."""
        return self.slices_of(self.rank)

    @cached_property
    def local(self) -> tuple[slice, ...]:
        """Where each of `slices` lies in this rank's tensors."""
        step = self.piece_length
        return tuple(slice(i * step, i * step + part.size) for i, part in enumerate(self.slices))

    @cached_property
    def padding(self) -> tuple[slice, ...]:
        """The rows of this rank's tensors that are no token."""
        step = self.piece_length
        rows = (slice(at.stop, (i + 1) * step) for i, at in enumerate(self.local))
        return tuple(gap for gap in rows if gap.start < gap.stop)

    def zero_padding_(self, x: Tensor) -> Tensor:
        """Zero the rows of `x [B, T_local, ...]` that are no token, in place."""
        for gap in self.padding:
            x[:, gap] = 0
        return x

    def starts(self, part: Slice) -> tuple[int, ...]:
        """The places of a slice at which documents begin, counted from its own start."""
        first, last = bisect_left(self.cu_seqlens, part.begin), bisect_left(self.cu_seqlens, part.end)
        if first == 0 and self.past_tokens:
            first = 1
        return tuple(c - part.begin for c in self.cu_seqlens[first:last])

    def document_start(self, position: int) -> int:
        """Where the document of a token begins."""
        return self.cu_seqlens[bisect_right(self.cu_seqlens, position) - 1]

    def document_end(self, position: int) -> int:
        """Where the document of a token ends."""
        return self.cu_seqlens[bisect_right(self.cu_seqlens, position)]

    def documents_in(self, part: Slice) -> list[int]:
        """The begin and end of a slice and the starts of documents between them, ascending; a document's tokens lie
        between two of them. Nothing for a slice without tokens.
        """
        if part.size == 0:
            return []
        first = bisect_right(self.cu_seqlens, part.begin)
        last = bisect_right(self.cu_seqlens, part.end - 1)
        return [part.begin, *self.cu_seqlens[first:last], part.end]

    @cached_property
    def tokens(self) -> Tensor:
        """The place of each of this rank's rows in the whole sequence, `[local_length]` int64, -1 for padding."""
        return self.shard(torch.arange(self.length), dim=0, fill=-1)

    @cached_property
    def positions(self) -> Tensor:
        """The place of each of this rank's tokens in its own document: `[local_length]` int64, on the CPU."""
        bounds = torch.tensor(self.cu_seqlens)
        begins = bounds[torch.searchsorted(bounds, self.tokens.clamp(min=0), right=True) - 1]
        found = torch.where(begins == 0, self.tokens + self.past_tokens, self.tokens - begins)
        return torch.where(self.tokens < 0, 0, found)

    def shard(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """This rank's tokens of a whole tensor, along `dim`; padding is `fill`."""
        if x.shape[dim] != self.length:
            raise ValueError(f"shard: dimension {dim} has {x.shape[dim]} tokens, the layout {self.length}")
        parts = []
        for part in self.slices:
            parts.append(x.narrow(dim, part.begin, part.size))
            missing = list(x.shape)
            missing[dim] = self.piece_length - part.size
            if missing[dim]:
                parts.append(x.new_full(missing, fill))
        return torch.cat(parts, dim=dim)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole tensor without padding, from every rank's part in the order of ranks."""
        if len(parts) != self.size:
            raise ValueError(f"unshard: {len(parts)} parts for {self.size} ranks")
        step = self.piece_length
        pieces = [parts[rank].narrow(dim, place * step, step) for rank, place in self.places]
        return torch.cat(pieces, dim=dim).narrow(dim, 0, self.length)

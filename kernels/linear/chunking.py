"""How the torch kernels walk a sequence: some heads at a time, chunk by chunk, in buffers that stay in cache.

Speed on a CPU is a matter of cache: all operands of the few matrix products of a chunk have to fit into it, and no
large tensor is made anew for a chunk. A `Walk` gives the pieces `[G, C, ...]` of the tensors of a recurrence, G the
(batch, head) pairs that are taken together, C the tokens of a chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.recurrence import Segment, state_heads


class Scratch:
    """Buffers by name, made once at their largest size and handed out as contiguous views, their content undefined."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The buffer of this name in a shape; what it held under another one is lost."""
        view = self._views.get((name, shape))
        if view is None:
            size = torch.Size(shape).numel()
            buffer = self._buffers.get(name)
            if buffer is None or buffer.numel() < size:
                buffer = self._buffers[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
            view = self._views[name, shape] = buffer[:size].view(shape)
        return view


@dataclass(frozen=True)
class HeadGroup:
    """State heads `first` to `last` of the batch rows `row` to `end_row`: G = rows x heads pairs."""

    row: int
    end_row: int
    first: int
    last: int

    @property
    def rows(self) -> slice:
        """The batch rows."""
        return slice(self.row, self.end_row)

    @property
    def count(self) -> int:
        """G."""
        return (self.end_row - self.row) * (self.last - self.first)


@dataclass(frozen=True)
class Chunk:
    """Tokens `begin` to `end` of the tensors at hand, with the starts of documents counted from `begin`.

    `size` is the number of rows that its pieces have: at least its tokens, the rows behind them zero.
    """

    begin: int
    end: int
    starts: tuple[int, ...]
    size: int

    @property
    def tokens(self) -> int:
        """Its tokens."""
        return self.end - self.begin


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def chunks(segment: Segment, size: int, *, halving: bool) -> list[Chunk]:
    """A segment in chunks of `size` tokens, the last one as long as what is left.

    `halving`: their rows are a power of two, for what splits a chunk into halves again and again.
    """
    parts = segment.cut(size) if segment.size else []
    return [Chunk(p.begin, p.end, p.starts, power_of_two(p.size) if halving else p.size) for p in parts]


class Walk:
    """A pass over the tensors `[B, T, heads, D]` of a recurrence, as pieces `[G, C, D]` in the accumulation dtype."""

    def __init__(self, k: Tensor, v: Tensor, gates: Sequence[Tensor], together: int) -> None:
        self.batch, self.length, self.heads = k.shape[0], k.shape[1], state_heads(k, v, gates)
        self.key_dim, self.value_dim = k.shape[3], v.shape[3]
        self.together = together
        self._views: dict[tuple[int, HeadGroup, int], tuple[Tensor, Tensor]] = {}
        self.scratch = Scratch(accumulation_dtype(k.dtype), k.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pieces."""
        return self.scratch.dtype

    def groups(self) -> Iterator[HeadGroup]:
        """All (batch, head) pairs, at most `together` at a time."""
        if self.heads >= self.together:
            for row in range(self.batch):
                for first in range(0, self.heads, self.together):
                    yield HeadGroup(row, row + 1, first, min(first + self.together, self.heads))
        else:
            step = max(1, self.together // self.heads)
            for row in range(0, self.batch, step):
                yield HeadGroup(row, min(row + step, self.batch), 0, self.heads)

    def repeats(self, x: Tensor) -> int:
        """How many heads of `x` read one state: 1 where it has as many heads as there are states, or fewer."""
        return max(1, x.shape[2] // self.heads)

    def outputs(self, q: Tensor, v: Tensor) -> Tensor:
        """Where the outputs go: `[B, T, Ho, V]` in v's dtype."""
        return v.new_empty((*q.shape[:2], max(q.shape[2], self.heads), self.value_dim))

    def _view(self, x: Tensor, heads: HeadGroup, nth: int) -> Tensor:
        """`[rows, heads, T, D]`: of several heads that read one state, the `nth`. Only where no states share heads."""
        key = (id(x), heads, nth)
        if key not in self._views:
            repeats = self.repeats(x)
            view = x[heads.rows, :, heads.first * repeats + nth : heads.last * repeats : repeats].transpose(1, 2)
            # With the tensor itself, so that its id stays its own.
            self._views[key] = (x, view)
        return self._views[key][1]

    def _shared_heads(self, x: Tensor, heads: HeadGroup) -> Tensor:
        """The head of x that each state takes, where states share heads of it."""
        return torch.arange(heads.first, heads.last, device=x.device) // (self.heads // x.shape[2])

    def load(self, name: str, x: Tensor, heads: HeadGroup, chunk: Chunk, nth: int = 0) -> Tensor:
        """A piece of `x`, to be read; a view where that is one, else a copy in the buffer `name`."""
        if x.shape[2] < self.heads:
            part = x[heads.rows, chunk.begin : chunk.end]
            view = part.index_select(2, self._shared_heads(x, heads)).transpose(1, 2)
        else:
            view = self._view(x, heads, nth)[:, :, chunk.begin : chunk.end]
        if view.shape[0] == 1 and view.dtype == self.dtype and chunk.size == chunk.tokens:
            return view[0]
        piece = self.scratch(name, *view.shape[:2], chunk.size, view.shape[3])
        piece[:, :, : chunk.tokens].copy_(view)
        if chunk.size > chunk.tokens:
            piece[:, :, chunk.tokens :] = 0
        return piece.view(-1, *piece.shape[2:])

    def gradient(self, x: Tensor) -> Tensor:
        """What the gradient of `x` is gathered in: zeros in the accumulation dtype where states share its heads."""
        if x.shape[2] < self.heads:
            return torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def store(self, x: Tensor, heads: HeadGroup, chunk: Chunk, value: Tensor, nth: int = 0) -> None:
        """Write a piece into a result, or add it where states share a head of it."""
        value = value.view(heads.end_row - heads.row, -1, *value.shape[1:])[:, :, : chunk.tokens]
        if x.shape[2] < self.heads:
            part = x[heads.rows, chunk.begin : chunk.end]
            part.index_add_(2, self._shared_heads(x, heads), value.transpose(1, 2))
        else:
            self._view(x, heads, nth)[:, :, chunk.begin : chunk.end] = value

    def scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """`x * factor`, in a buffer."""
        return torch.mul(x, factor, out=self.scratch(name, *x.shape))

    def product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """`x @ y`, in a buffer."""
        return torch.bmm(x, y, out=self.scratch(name, x.shape[0], x.shape[1], y.shape[2]))

    def states(self, segments: Sequence[Segment], value_dim: int) -> Tensor:
        """Zeros for one state of each segment, `[N, B, H, K, value_dim]`."""
        shape = (len(segments), self.batch, self.heads, self.key_dim, value_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.scratch.device)

    def state(self, states: Tensor, heads: HeadGroup) -> Tensor:
        """A contiguous copy of states `[B, H, ...]`, as `[G, ...]`, to be changed in place."""
        part = states[heads.rows, heads.first : heads.last].to(self.dtype)
        return part.reshape(-1, *part.shape[2:]).clone(memory_format=torch.contiguous_format)

    def put_state(self, states: Tensor, heads: HeadGroup, value: Tensor) -> None:
        """Write `[G, ...]` into `[B, H, ...]`."""
        part = states[heads.rows, heads.first : heads.last]
        part.copy_(value.view(part.shape))


def walk_back(
    walk: Walk,
    parts: Sequence[Sequence[Chunk]],
    states: Tensor,
    dends: Tensor,
    advance: Callable[[HeadGroup, Chunk, Tensor], None],
    chunk_grad: Callable[[HeadGroup, Chunk, Tensor, Tensor], None],
    block: int,
) -> Tensor:
    """The backward pass over segments, given as their chunks: the gradient of `states`, both `[N, B, H, K, V]`.

    `advance(heads, chunk, state)` turns the state before a chunk into that behind it, in place;
    `chunk_grad(heads, chunk, state, dstate)` takes the state before a chunk and turns the gradient of the one behind it
    into that of the one before, in place. The states are made on the way forward: those at the starts of blocks of
    `block` chunks are kept, those in between made again when the block has its turn, so that few are held at a time.
    """
    dstates = torch.zeros_like(states, dtype=walk.dtype)
    for number, chunks_of_segment in enumerate(parts):
        blocks = [chunks_of_segment[i : i + block] for i in range(0, len(chunks_of_segment), block)]
        for heads in walk.groups():
            state, dstate = walk.state(states[number], heads), walk.state(dends[number], heads)
            begins = []
            for some in blocks:
                begins.append(state.clone())
                for chunk in some if some is not blocks[-1] else ():
                    advance(heads, chunk, state)
            for some, begin in zip(reversed(blocks), reversed(begins), strict=True):
                before = [begin]
                for nth, chunk in enumerate(some[:-1]):
                    before.append(walk.scratch(f"state{nth}", *begin.shape).copy_(before[-1]))
                    advance(heads, chunk, before[-1])
                for chunk, state in zip(reversed(some), reversed(before), strict=True):
                    chunk_grad(heads, chunk, state, dstate)
            walk.put_state(dstates[number], heads, dstate)
    return dstates

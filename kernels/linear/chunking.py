"""Chunk loops of the torch implementations: groups of heads, chunks of tokens, scratch buffers that stay in cache.

CPU speed depends on the cache: the operands of a chunk's few matrix products have to fit in it, and no chunk allocates
a large tensor. A `ChunkLoop` loads and stores tiles `[G, C, D]` of a recurrence's tensors: the G (batch, head) pairs of
a `HeadGroup`, the C tokens of a `Chunk`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.recurrence import Inputs, Segment


class Scratch:
    """Scratch buffers by name, allocated once at their largest size and returned as uninitialized contiguous views."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer of this name in a shape; views of it in other shapes share the memory."""
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
    """State heads `[first_head, end_head)` of batch rows `[first_row, end_row)`, multiplied in one batched product."""

    first_row: int
    end_row: int
    first_head: int
    end_head: int

    @property
    def rows(self) -> slice:
        """The batch rows."""
        return slice(self.first_row, self.end_row)

    @property
    def size(self) -> int:
        """G, the number of (batch, head) pairs."""
        return (self.end_row - self.first_row) * (self.end_head - self.first_head)


@dataclass(frozen=True)
class Chunk:
    """Tokens `[begin, end)` of a device's tensors; `starts` are the offsets in the chunk at which documents start.

    `size` is C, the rows of its tiles: at least its number of tokens; the rows after them are zero.
    """

    begin: int
    end: int
    starts: tuple[int, ...]
    size: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.end - self.begin


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def split_chunks(segment: Segment, size: int, *, pad_to_power_of_two: bool) -> list[Chunk]:
    """Split a segment into chunks of `size` tokens; the last one may be shorter.

    `pad_to_power_of_two` pads their rows, for vector decays, which halve a chunk down to single tokens.
    """
    parts = segment.cut(size) if segment.size else []
    return [Chunk(p.begin, p.end, p.starts, power_of_two(p.size) if pad_to_power_of_two else p.size) for p in parts]


class ChunkLoop:
    """One pass over the tensors `[B, T, heads, D]` of a recurrence, in tiles `[G, C, D]` of the accumulation dtype."""

    def __init__(self, inputs: Inputs, group_size: int) -> None:
        k = inputs.k
        self.length = k.shape[1]
        self.batch, self.heads, self.key_dim, self.value_dim = inputs.state_shape
        self.group_size = group_size
        self._views: dict[tuple[int, HeadGroup, int], tuple[Tensor, Tensor]] = {}
        self.scratch = Scratch(accumulation_dtype(k.dtype), k.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tiles."""
        return self.scratch.dtype

    def head_groups(self) -> Iterator[HeadGroup]:
        """Yield all (batch, head) pairs in groups of at most `group_size`."""
        if self.heads >= self.group_size:
            for row in range(self.batch):
                for first in range(0, self.heads, self.group_size):
                    yield HeadGroup(row, row + 1, first, min(first + self.group_size, self.heads))
        else:
            step = max(1, self.group_size // self.heads)
            for row in range(0, self.batch, step):
                yield HeadGroup(row, min(row + step, self.batch), 0, self.heads)

    def readers(self, x: Tensor) -> int:
        """Return the heads of `x` per state, at least 1: query heads that read the same state."""
        return max(1, x.shape[2] // self.heads)

    def empty_outputs(self, q: Tensor, v: Tensor) -> Tensor:
        """Allocate the outputs, `[B, T, Ho, V]` in v's dtype."""
        return v.new_empty((*q.shape[:2], max(q.shape[2], self.heads), self.value_dim))

    def _view(self, x: Tensor, group: HeadGroup, reader: int) -> Tensor:
        """View one head of `x` per state, `[rows, heads, T, D]`: the one at index `reader` where several read a state.

        Not for heads that several states share.
        """
        key = (id(x), group, reader)
        if key not in self._views:
            readers = self.readers(x)
            heads = slice(group.first_head * readers + reader, group.end_head * readers, readers)
            view = x[group.rows, :, heads].transpose(1, 2)
            # Kept with the tensor itself, so that its id is not reused.
            self._views[key] = (x, view)
        return self._views[key][1]

    def _shared_heads(self, x: Tensor, group: HeadGroup) -> Tensor:
        """Return the head of `x` that each state reads, where several states share a head."""
        return torch.arange(group.first_head, group.end_head, device=x.device) // (self.heads // x.shape[2])

    def load(self, name: str, x: Tensor, group: HeadGroup, chunk: Chunk, reader: int = 0) -> Tensor:
        """Load a tile of `x`, read-only: a view where its layout and dtype allow one, else a copy in buffer `name`."""
        if x.shape[2] < self.heads:
            part = x[group.rows, chunk.begin : chunk.end]
            view = part.index_select(2, self._shared_heads(x, group)).transpose(1, 2)
        else:
            view = self._view(x, group, reader)[:, :, chunk.begin : chunk.end]
        if view.shape[0] == 1 and view.dtype == self.dtype and chunk.size == chunk.tokens:
            return view[0]
        tile = self.scratch(name, *view.shape[:2], chunk.size, view.shape[3])
        tile[:, :, : chunk.tokens].copy_(view)
        if chunk.size > chunk.tokens:
            tile[:, :, chunk.tokens :] = 0
        return tile.view(-1, *tile.shape[2:])

    def grad_buffer(self, x: Tensor) -> Tensor:
        """Allocate the gradient of `x`: zeros in the accumulation dtype where states share heads of `x`, for sums."""
        if x.shape[2] < self.heads:
            return torch.zeros(x.shape, dtype=self.dtype, device=x.device)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def store(self, x: Tensor, group: HeadGroup, chunk: Chunk, tile: Tensor, reader: int = 0) -> None:
        """Write a tile to a result `x`, or add it where states share heads of `x`."""
        tile = tile.view(group.end_row - group.first_row, -1, *tile.shape[1:])[:, :, : chunk.tokens]
        if x.shape[2] < self.heads:
            part = x[group.rows, chunk.begin : chunk.end]
            part.index_add_(2, self._shared_heads(x, group), tile.transpose(1, 2))
        else:
            self._view(x, group, reader)[:, :, chunk.begin : chunk.end] = tile

    def scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """Compute `x * factor` in buffer `name`."""
        return torch.mul(x, factor, out=self.scratch(name, *x.shape))

    def product(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Compute `x @ y` in buffer `name`."""
        return torch.bmm(x, y, out=self.scratch(name, x.shape[0], x.shape[1], y.shape[2]))

    def zero_states(self, segments: Sequence[Segment], value_dim: int) -> Tensor:
        """Return a zero state per segment, `[N, B, H, K, value_dim]`."""
        shape = (len(segments), self.batch, self.heads, self.key_dim, value_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.scratch.device)

    def load_state(self, states: Tensor, group: HeadGroup) -> Tensor:
        """Copy a group's states from `[B, H, ...]`, contiguous `[G, ...]`, to be updated in place."""
        part = states[group.rows, group.first_head : group.end_head].to(self.dtype)
        return part.reshape(-1, *part.shape[2:]).clone(memory_format=torch.contiguous_format)

    def store_state(self, states: Tensor, group: HeadGroup, value: Tensor) -> None:
        """Write a group's states `[G, ...]` to `[B, H, ...]`."""
        part = states[group.rows, group.first_head : group.end_head]
        part.copy_(value.view(part.shape))

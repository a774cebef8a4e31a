"""Row tables: which rows of one model's tensors are which rows of another's, usable in both directions.

Converting between two layouts of the same model changes no number: rows of matrices only move. An expert tensor
`[E, rows, columns]` counts as the rows of all experts, a vector as rows of one number. So a tensor that is written by a
table and read back by it is bit-identical.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.checkpoint.lazy_tensors import LazyTensor
from longctx.checkpoint.weights import Weights

BUFFER_BYTES = 2**30
"""Bytes of a tensor, in float32, that are in memory at a time."""


class RowRange(NamedTuple):
    """Consecutive rows of a tensor."""

    name: str
    begin: int
    rows: int


@dataclass(frozen=True)
class MappedTensor:
    """A tensor as a concatenation of row ranges of another layout's tensors."""

    shape: torch.Size
    ranges: tuple[RowRange, ...]


ReadRows = Callable[[str, int, int], Tensor]
"""Reads rows [begin, end) of the tensor `name`: `[end - begin, columns]`, or `[end - begin]` for a vector."""


class RowTable:
    """Maps each tensor of the built-in model ("ours") to row ranges of another layout ("theirs"), by name."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._ranges: dict[str, tuple[RowRange, ...]] = {}
        self._row_shapes: dict[str, torch.Size] = {}
        """Shape of each of their tensors after the first dimension."""

    def shape(self, ours: str) -> torch.Size:
        """Return the shape of a tensor of the built-in model."""
        return self._shapes[ours]

    def put(self, ours: str, *ranges: RowRange | str, conv: bool = False, same_shape: bool = False) -> None:
        """Map a tensor to ranges; a name stands for a full tensor with the rows that the other ranges leave.

        `conv`: their tensor has a dimension of 1 after the rows, as the weights of depthwise convolutions do.
        `same_shape`: their tensor has the dimensions of ours after the first.
        """
        rows, columns = flat_shape(self._shapes[ours])
        row_shape = self._shapes[ours][1:] if same_shape else torch.Size([1, *columns] if conv else columns)
        rest = rows - sum(item.rows for item in ranges if isinstance(item, RowRange))
        full = tuple(item if isinstance(item, RowRange) else RowRange(item, 0, rest) for item in ranges)
        assert sum(item.rows for item in full) == rows, ours
        self._ranges[ours] = full
        for item in full:
            self._row_shapes[item.name] = row_shape

    @property
    def ours(self) -> dict[str, MappedTensor]:
        """The built-in model's tensors; every one of them must have been put."""
        assert self._ranges.keys() == self._shapes.keys(), self._ranges.keys() ^ self._shapes.keys()
        return {name: MappedTensor(self._shapes[name], ranges) for name, ranges in self._ranges.items()}

    @property
    def theirs(self) -> dict[str, MappedTensor]:
        """The other layout's tensors, in the order of the built-in ones that they begin in."""
        parts: dict[str, list[tuple[int, RowRange]]] = {}
        for ours, ranges in self._ranges.items():
            row = 0
            for item in ranges:
                parts.setdefault(item.name, []).append((item.begin, RowRange(ours, row, item.rows)))
                row += item.rows
        return {name: self._inverse(name, items) for name, items in parts.items()}

    def _inverse(self, name: str, parts: list[tuple[int, RowRange]]) -> MappedTensor:
        parts.sort()
        row = 0
        for begin, item in parts:
            assert begin == row, name
            row += item.rows
        row_shape = self._row_shapes[name]
        shape = torch.Size([row // torch.Size(row_shape[:-1]).numel(), *row_shape])
        return MappedTensor(shape, tuple(item for _, item in parts))


def flat_shape(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return the number of rows of a tensor, and the shape of one row."""
    return (shape[0], ()) if len(shape) == 1 else (torch.Size(shape[:-1]).numel(), (shape[-1],))


def rows_per_buffer(shape: Sequence[int]) -> int:
    """Return how many entries of a float32 tensor's first dimension fit in `BUFFER_BYTES`, at least one."""
    return max(1, BUFFER_BYTES // (4 * torch.Size(shape[1:]).numel()))


def gather_rows(ranges: Iterable[RowRange], begin: int, end: int, out: Tensor, read: ReadRows) -> Tensor:
    """Fill `out` with rows [begin, end) of the tensor that `ranges` make up, and return it."""
    row = 0
    for item in ranges:
        first, last = max(begin, row), min(end, row + item.rows)
        if first < last:
            offset = item.begin - row
            # A range may be larger than a buffer.
            for start, stop in _buffers(first, last, out):
                out[start - begin : stop - begin] = read(item.name, start + offset, stop + offset)
        row += item.rows
    return out


def _buffers(begin: int, end: int, out: Tensor) -> Iterator[tuple[int, int]]:
    step = rows_per_buffer(out.shape)
    return ((start, min(start + step, end)) for start in range(begin, end, step))


def lazy_tensor(mapped: MappedTensor, read: ReadRows) -> LazyTensor:
    """Return a tensor that is gathered with `read` when it is written, in buffers of at most `BUFFER_BYTES` (at least
    one entry of its first dimension)."""
    rows, columns = flat_shape(mapped.shape)
    rows_per_entry = rows // mapped.shape[0]

    def make(begin: int, end: int) -> Tensor:
        out = torch.empty((end - begin) * rows_per_entry, *columns)
        gather_rows(mapped.ranges, begin * rows_per_entry, end * rows_per_entry, out, read)
        return out.view(end - begin, *mapped.shape[1:])

    return LazyTensor(mapped.shape, make, rows=rows_per_buffer(mapped.shape))


class CachedRows:
    """Reads rows of the built-in model's weights through a cache of the last two buffers: exports read rows of the same
    tensor one after the other."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._buffer = lru_cache(maxsize=2)(self._read_buffer)

    def _read_buffer(self, name: str, number: int) -> Tensor:
        step, shape = self._entries(name), self._weights.shapes[name]
        return self._weights.read_rows(name, number * step, min((number + 1) * step, shape[0]))

    def _entries(self, name: str) -> int:
        """Return the entries of the first dimension in a buffer."""
        return rows_per_buffer(self._weights.shapes[name])

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read rows [begin, end) of a tensor, as a `ReadRows`."""
        shape = self._weights.shapes[name]
        rows, columns = flat_shape(shape)
        out = torch.empty(end - begin, *columns)
        buffer_rows = self._entries(name) * (rows // shape[0])
        for number in range(begin // buffer_rows, -(-end // buffer_rows)):
            first, last = max(begin, number * buffer_rows), min(end, (number + 1) * buffer_rows)
            buffer = self._buffer(name, number).view(-1, *columns)
            out[first - begin : last - begin] = buffer[first - number * buffer_rows : last - number * buffer_rows]
        return out

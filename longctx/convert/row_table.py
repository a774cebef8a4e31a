"""Where the rows of one model's tensors lie in another's: one table, read in both directions.

Between two layouts of the same model no number changes: rows of matrices are put elsewhere. A tensor of experts
`[E, rows, columns]` counts as the rows of all of them, a vector as rows of one number. So what is written from a table
and read by it again is the same to the bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.checkpoint.lazy_tensors import LazyTensor
from longctx.checkpoint.weights import Weights

PIECE = 2**30
"""Bytes of a tensor that are in memory at one time, in float32."""


class Run(NamedTuple):
    """Rows of a tensor, one after the other."""

    name: str
    begin: int
    rows: int


@dataclass(frozen=True)
class Whole:
    """A tensor as runs of another layout's rows."""

    shape: torch.Size
    runs: tuple[Run, ...]


Read = Callable[[str, int, int], Tensor]
"""Rows of a tensor, by name, first and end: `[end - begin, columns]`, of a vector `[end - begin]`."""


class RowTable:
    """Of each tensor of the built-in model the runs that it is made of, by name."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self._runs: dict[str, tuple[Run, ...]] = {}
        self._theirs: dict[str, torch.Size] = {}
        """Of each of their tensors the shape behind the rows."""

    def shape(self, ours: str) -> torch.Size:
        """Of a tensor of the built-in model."""
        return self._shapes[ours]

    def put(self, ours: str, *runs: Run | str, middle: bool = False, alike: bool = False) -> None:
        """Say what a tensor is made of: runs, or a name for a whole tensor of as many rows as are left.

        `middle`: theirs has a dimension of 1 behind the rows, as the weights of convolutions over channels do; `alike`:
        those that ours has behind the first.
        """
        rows, columns = flat(self._shapes[ours])
        behind = self._shapes[ours][1:] if alike else torch.Size([1, *columns] if middle else columns)
        left = rows - sum(run.rows for run in runs if isinstance(run, Run))
        found = tuple(run if isinstance(run, Run) else Run(run, 0, left) for run in runs)
        assert sum(run.rows for run in found) == rows, ours
        self._runs[ours] = found
        for run in found:
            self._theirs[run.name] = behind

    @property
    def ours(self) -> dict[str, Whole]:
        """The built-in model's tensors. They have to be all of them."""
        assert self._runs.keys() == self._shapes.keys(), self._runs.keys() ^ self._shapes.keys()
        return {name: Whole(self._shapes[name], runs) for name, runs in self._runs.items()}

    @property
    def theirs(self) -> dict[str, Whole]:
        """The other layout's tensors, in order of the built-in ones that they begin in."""
        found: dict[str, list[tuple[int, Run]]] = {}
        for ours, runs in self._runs.items():
            row = 0
            for run in runs:
                found.setdefault(run.name, []).append((run.begin, Run(ours, row, run.rows)))
                row += run.rows
        return {name: Whole(*self._whole(name, pieces)) for name, pieces in found.items()}

    def _whole(self, name: str, pieces: list[tuple[int, Run]]) -> tuple[torch.Size, tuple[Run, ...]]:
        pieces.sort()
        row = 0
        for begin, run in pieces:
            assert begin == row, name
            row += run.rows
        behind = self._theirs[name]
        return torch.Size([row // torch.Size(behind[:-1]).numel(), *behind]), tuple(run for _, run in pieces)


def flat(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The rows of a tensor, and the shape of one."""
    return (shape[0], ()) if len(shape) == 1 else (torch.Size(shape[:-1]).numel(), (shape[-1],))


def at_once(shape: Sequence[int]) -> int:
    """How many of the first dimension of a tensor in float32 are in memory at one time: `PIECE` bytes, at least one."""
    return max(1, PIECE // (4 * torch.Size(shape[1:]).numel()))


def gather(runs: Iterable[Run], begin: int, end: int, out: Tensor, read: Read) -> Tensor:
    """Fill `out` with the rows from `begin` up to `end` of a tensor that is made of runs; `out` again."""
    row = 0
    for run in runs:
        first, last = max(begin, row), min(end, row + run.rows)
        if first < last:
            offset = run.begin - row
            # A run may be more than a piece of it may hold in memory.
            for at, stop in _pieces(first, last, out):
                out[at - begin : stop - begin] = read(run.name, at + offset, stop + offset)
        row += run.rows
    return out


def _pieces(begin: int, end: int, out: Tensor) -> Iterator[tuple[int, int]]:
    step = at_once(out.shape)
    return ((at, min(at + step, end)) for at in range(begin, end, step))


def made(whole: Whole, read: Read) -> LazyTensor:
    """A tensor that is made of what `read` gives when it is written, in pieces of at most `PIECE` bytes (at least a row
    of its first dimension)."""
    rows, columns = flat(whole.shape)
    each = rows // whole.shape[0]

    def make(begin: int, end: int) -> Tensor:
        out = torch.empty((end - begin) * each, *columns)
        gather(whole.runs, begin * each, end * each, out, read)
        return out.view(end - begin, *whole.shape[1:])

    return LazyTensor(whole.shape, make, rows=at_once(whole.shape))


class Blocks:
    """Rows of built-in tensors, of which the last blocks read are kept: theirs follow each other in ours."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._block = lru_cache(maxsize=2)(self._read)

    def _read(self, name: str, number: int) -> Tensor:
        step, shape = self._step(name), self._weights.shapes[name]
        return self._weights.read_rows(name, number * step, min((number + 1) * step, shape[0]))

    def _step(self, name: str) -> int:
        """Rows of the first dimension in a block."""
        return at_once(self._weights.shapes[name])

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """As `Read` says."""
        shape = self._weights.shapes[name]
        rows, columns = flat(shape)
        out = torch.empty(end - begin, *columns)
        block = self._step(name) * (rows // shape[0])
        for number in range(begin // block, -(-end // block)):
            first, last = max(begin, number * block), min(end, (number + 1) * block)
            kept = self._block(name, number).view(-1, *columns)
            out[first - begin : last - begin] = kept[first - number * block : last - number * block]
        return out

"""Collectives: asynchronous, counted, each with its inverse named.

all_gather / reduce_scatter are each other's backward. A handle owns the buffers until the data
has arrived. Calls and bytes are counted here, and nowhere else.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two; the old names go on to work, with a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """What a rank asked for: calls, and bytes that it received, by collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, received: int) -> None:
        """Count one call."""
        self.calls[name] += 1
        self.bytes[name] += received


_counters: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives that this rank issues inside the block, the backward pass included."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def _count(name: str, received: int) -> None:
    for traffic in _counters:
        traffic.add(name, received)


class Pending:
    """A collective under way. `wait()` gives its result."""

    def __init__(self, work: dist.Work, out: Tensor, sent: Tensor) -> None:
        self._work = work
        self._out = out
        # The send buffer has to live until the data has left.
        self._sent = sent

    def wait(self) -> Tensor:
        """Block until the data is there (on CUDA: until the current stream may use it)."""
        self._work.wait()
        return self._out


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Pending:
    """Every rank's `x`, stacked in the order of ranks: `[W, *x.shape]`. `group` None: all ranks."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    out = x.new_empty(size, *x.shape)
    work = _all_gather(out.view(-1), x.view(-1), group=group, async_op=True)
    _count("all_gather", (size - 1) * x.numel() * x.element_size())
    return Pending(work, out, x)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum over ranks of this rank's row of `x [W, ...]`: `x.shape[1:]`."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    out = torch.empty_like(x[0])
    work = _reduce_scatter(out.view(-1), x.view(-1), group=group, async_op=True)
    _count("reduce_scatter", (size - 1) * out.numel() * out.element_size())
    return Pending(work, out, x)


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, in place, waited for. `group` None: all ranks."""
    size = dist.get_world_size(group)
    if size > 1:
        dist.all_reduce(x, group=group)
        _count("all_reduce", 2 * (size - 1) * x.numel() * x.element_size() // size)
    return x

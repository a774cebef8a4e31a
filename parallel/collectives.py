"""Collectives: asynchronous and counted; their errors name the layer and the collective.

all_gather and reduce_scatter are each other's backward; all_to_all is its own with send and receive sizes swapped, and
the point-to-point `exchange` with senders and receivers swapped. A handle keeps its buffers alive until the data has
arrived. Calls and bytes are counted here (`longctx.parallel.traffic`).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.parallel.mesh import Axis
from longctx.parallel.traffic import communicating, current_layer, record_call, record_wait

# torch 2.13 renames these two; the old names still work, with a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective failed on this rank: another rank crashed, skipped it or timed out."""


@contextmanager
def _named(description: str, layer: str) -> Iterator[None]:
    try:
        with communicating(description, layer):
            yield
    except RuntimeError as error:
        where = f"layer {layer}: " if layer else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CollectiveError(f"{where}{description} on rank {dist.get_rank()} failed: {reason}") from error


class VirtualGroup(dist.ProcessGroup):
    """A group whose ranks share processes (`longctx.parallel.virtual_ranks`): it communicates by its own methods.

    Each returns a function that waits for the result. An abstract class, but for ABC, whose metaclass is not that of
    ProcessGroup.
    """

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Gather every rank's `x`: `[W, *x.shape]`."""
        raise NotImplementedError

    def start_all_reduce(self, x: Tensor) -> Callable[[], Tensor]:
        """Sum `x` over ranks."""
        raise NotImplementedError

    def start_reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """Sum `x [W, ...]` over ranks, this rank's row."""
        raise NotImplementedError

    def start_all_to_all(self, sent: Tensor, sends: list[int], receives: list[int]) -> Callable[[], Tensor]:
        """Send `sends[r]` elements to rank r, receive `receives[r]`."""
        raise NotImplementedError

    def start_exchange(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int
    ) -> Callable[[], None]:
        """Send to ranks, receive into buffers."""
        raise NotImplementedError


class Pending(Generic[T]):
    """Handle of a running collective; `wait()` returns its result."""

    def __init__(self, description: str, works: Sequence[dist.Work], out: T | Callable[[], T], sent: object) -> None:
        self._description, self._layer = description, current_layer()
        self._works = works
        self._out = out
        # The send buffers have to stay allocated until the data is sent.
        self._sent = sent

    def wait(self) -> T:
        """Block until the data has arrived (CUDA: until the current stream may use it). Raises CollectiveError."""
        began = time.perf_counter()
        with _named(self._description, self._layer):
            for work in self._works:
                work.wait()
            out = self._out() if callable(self._out) else self._out
        record_wait(time.perf_counter() - began)
        return out


def _describe(name: str, x: Tensor, size: int) -> str:
    return f"{name} of {list(x.shape)} {str(x.dtype).removeprefix('torch.')} over {size} ranks"


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Pending[Tensor]:
    """Gather every rank's `x`, stacked in rank order: `[W, *x.shape]`. `group` None: all ranks."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    description = _describe("all_gather", x, size)
    if isinstance(group, VirtualGroup):
        record_call("all_gather", (size - 1) * x.nbytes)
        return Pending(description, [], group.start_all_gather(x), x)
    out = x.new_empty(size, *x.shape)
    with _named(description, current_layer()):
        work = _all_gather(out.view(-1), x.view(-1), group=group, async_op=True)
    record_call("all_gather", (size - 1) * x.nbytes)
    return Pending(description, [work], out, x)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    """Sum `x [W, ...]` over ranks and return this rank's row of the sum, `x.shape[1:]`."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    description = _describe("reduce_scatter", x, size)
    if isinstance(group, VirtualGroup):
        record_call("reduce_scatter", (size - 1) * x[0].nbytes)
        return Pending(description, [], group.start_reduce_scatter(x), x)
    out = torch.empty_like(x[0])
    with _named(description, current_layer()):
        work = _reduce_scatter(out.view(-1), x.view(-1), group=group, async_op=True)
    record_call("reduce_scatter", (size - 1) * out.nbytes)
    return Pending(description, [work], out, x)


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `x` over ranks in place; blocks. `group` None: all ranks."""
    size = dist.get_world_size(group)
    if size > 1:
        with _named(_describe("all_reduce", x, size), current_layer()):
            if isinstance(group, VirtualGroup):
                x.copy_(group.start_all_reduce(x)())
            else:
                dist.all_reduce(x, group=group)
        record_call("all_reduce", 2 * (size - 1) * x.nbytes // size)
    return x


def all_gather_dict(values: Mapping[str, T], axis: Axis) -> dict[str, T]:
    """Merge the dicts of all ranks of an axis, in rank order, on every rank; ranks have different keys.

    For small host objects: they are pickled.
    """
    if axis.group is None:
        return dict(values)
    dicts: list[Mapping[str, T]] = [{}] * axis.size
    with _named(f"all_gather of objects over {axis.size} ranks", current_layer()):
        dist.all_gather_object(dicts, dict(values), group=axis.group)
    return {name: value for by_name in dicts for name, value in by_name.items()}


def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> Pending[list[Tensor]]:
    """Send `parts[r]` (one dtype) to rank r and receive `sizes[r]` elements from it, flat, as a list in rank order."""
    sent, receives = torch.cat([part.reshape(-1) for part in parts]), list(sizes)
    return _all_to_all(sent, [part.numel() for part in parts], receives, group, lambda out: list(out.split(receives)))


def all_to_all_rows(
    x: Tensor, sends: Sequence[int], receives: Sequence[int], group: dist.ProcessGroup
) -> Pending[Tensor]:
    """Send the first sends[0] rows of `x [N, ...]` to rank 0, the next sends[1] to rank 1, and so on; return the
    received rows, `receives[r]` from rank r, in rank order: `[sum(receives), ...]`."""
    x, width = x.contiguous(), math.prod(x.shape[1:])
    sizes = [n * width for n in sends], [n * width for n in receives]
    return _all_to_all(x.view(-1), *sizes, group, lambda out: out.view(-1, *x.shape[1:]))


def _all_to_all(
    sent: Tensor,
    sends: list[int],
    receives: list[int],
    group: dist.ProcessGroup,
    shaped: Callable[[Tensor], T],
) -> Pending[T]:
    """Send flat; `shaped` gives what was received, flat, its form."""
    description = _describe("all_to_all", sent, dist.get_world_size(group))
    arriving = (sum(receives) - receives[group.rank()]) * sent.element_size()
    if isinstance(group, VirtualGroup):
        record_call("all_to_all", arriving)
        received = group.start_all_to_all(sent, sends, receives)
        return Pending[T](description, [], lambda: shaped(received()), sent)
    out = sent.new_empty(sum(receives))
    with _named(description, current_layer()):
        work = dist.all_to_all_single(out, sent, receives, sends, group=group, async_op=True)
    record_call("all_to_all", arriving)
    return Pending(description, [work], shaped(out), sent)


def exchange(
    sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], group: dist.ProcessGroup, tag: int = 0
) -> Pending[None]:
    """Point-to-point: send tensors to ranks of a group and receive into buffers from others; no-op if both are empty.

    Both ranks of a pair have to call it, with equal sizes. Concurrent messages of a pair need different tags, or arrive
    in the order in which they were sent.
    """
    sent = {peer: x.contiguous() for peer, x in sends.items()}
    for x in receives.values():
        assert x.is_contiguous()
    description = f"exchange (to {', '.join(map(str, sent)) or 'none'}, from {', '.join(map(str, receives)) or 'none'})"
    if isinstance(group, VirtualGroup):
        if any(x.numel() for x in (*sent.values(), *receives.values())):
            record_call("exchange", sum(x.nbytes for x in receives.values()))
        return Pending(description, [], group.start_exchange(sent, receives, tag), sent)
    operations = [
        dist.P2POp(dist.irecv, x, group=group, group_peer=peer, tag=tag) for peer, x in receives.items() if x.numel()
    ] + [dist.P2POp(dist.isend, x, group=group, group_peer=peer, tag=tag) for peer, x in sent.items() if x.numel()]
    works: list[dist.Work] = []
    if operations:
        with _named(description, current_layer()):
            works = dist.batch_isend_irecv(operations)
        record_call("exchange", sum(x.nbytes for x in receives.values()))
    return Pending(description, works, None, sent)

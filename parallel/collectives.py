"""Collectives: asynchronous, counted, each with its inverse named.

all_gather and reduce_scatter are each other's backward, all_to_all its own with the sizes exchanged, and an exchange
between pairs its own with senders and receivers exchanged. A handle owns the buffers until the data has arrived, and an
error that it raises names the layer and the collective. Calls and bytes are counted here (`longctx.parallel.traffic`).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.parallel.mesh import Axis
from longctx.parallel.traffic import count, current_layer, waited

# torch 2.13 renames these two; the old names go on to work, with a warning.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A collective failed on this rank: another one died, left it, or did not answer in time."""


@contextmanager
def _named(what: str, layer: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        where = f"layer {layer}: " if layer else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CollectiveError(f"{where}{what} on rank {dist.get_rank()} failed: {reason}") from error


class Pending(Generic[T]):
    """A collective under way. `wait()` gives its result."""

    def __init__(self, what: str, works: Sequence[dist.Work], out: T, sent: object) -> None:
        self._what, self._layer = what, current_layer()
        self._works = works
        self._out = out
        # The send buffers have to live until the data has left.
        self._sent = sent

    def wait(self) -> T:
        """Block until the data is there (on CUDA: until the current stream may use it). Raises CollectiveError."""
        began = time.perf_counter()
        with _named(self._what, self._layer):
            for work in self._works:
                work.wait()
        waited(time.perf_counter() - began)
        return self._out


def _told(name: str, x: Tensor, size: int) -> str:
    return f"{name} of {list(x.shape)} {str(x.dtype).removeprefix('torch.')} over {size} ranks"


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Pending[Tensor]:
    """Every rank's `x`, stacked in the order of ranks: `[W, *x.shape]`. `group` None: all ranks."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    out = x.new_empty(size, *x.shape)
    what = _told("all_gather", x, size)
    with _named(what, current_layer()):
        work = _all_gather(out.view(-1), x.view(-1), group=group, async_op=True)
    count("all_gather", (size - 1) * x.nbytes)
    return Pending(what, [work], out, x)


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    """The sum over ranks of this rank's row of `x [W, ...]`: `x.shape[1:]`."""
    size = dist.get_world_size(group)
    x = x.contiguous()
    out = torch.empty_like(x[0])
    what = _told("reduce_scatter", x, size)
    with _named(what, current_layer()):
        work = _reduce_scatter(out.view(-1), x.view(-1), group=group, async_op=True)
    count("reduce_scatter", (size - 1) * out.nbytes)
    return Pending(what, [work], out, x)


def all_reduce(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, in place, waited for. `group` None: all ranks."""
    size = dist.get_world_size(group)
    if size > 1:
        with _named(_told("all_reduce", x, size), current_layer()):
            dist.all_reduce(x, group=group)
        count("all_reduce", 2 * (size - 1) * x.nbytes // size)
    return x


def gather_named(found: Mapping[str, T], axis: Axis) -> dict[str, T]:
    """What the ranks of an axis have by names, each under its own, in the order of ranks: on every rank.

    For what is small and on the host: it is pickled.
    """
    if axis.group is None:
        return dict(found)
    each: list[Mapping[str, T]] = [{}] * axis.size
    with _named(f"all_gather of objects over {axis.size} ranks", current_layer()):
        dist.all_gather_object(each, dict(found), group=axis.group)
    return {name: value for one in each for name, value in one.items()}


def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> Pending[list[Tensor]]:
    """Send `parts[r]` to rank r, all of one dtype, and receive `sizes[r]` numbers from it: flat, in rank order."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    what, work, out = _all_to_all(sent, [part.numel() for part in parts], list(sizes), group)
    return Pending(what, [work], list(out.split(list(sizes))), sent)


def all_to_all_rows(
    x: Tensor, sends: Sequence[int], receives: Sequence[int], group: dist.ProcessGroup
) -> Pending[Tensor]:
    """Send the first sends[0] rows of `x [N, ...]` to rank 0, the next sends[1] to rank 1, and so on, and receive
    `receives[r]` rows from rank r: `[sum(receives), ...]`, in rank order."""
    x, width = x.contiguous(), math.prod(x.shape[1:])
    what, work, out = _all_to_all(x.view(-1), [n * width for n in sends], [n * width for n in receives], group)
    return Pending(what, [work], out.view(-1, *x.shape[1:]), x)


def _all_to_all(
    sent: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup
) -> tuple[str, dist.Work, Tensor]:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    out = sent.new_empty(sum(receives))
    what = _told("all_to_all", sent, size)
    with _named(what, current_layer()):
        work = dist.all_to_all_single(out, sent, receives, sends, group=group, async_op=True)
    count("all_to_all", (sum(receives) - receives[rank]) * out.element_size())
    return what, work, out


def exchange(
    sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], group: dist.ProcessGroup, tag: int = 0
) -> Pending[None]:
    """Send tensors to ranks of a group and receive others, given as empty buffers; nothing where both are empty.

    Each pair of ranks has to name each other, with as many numbers; messages of a pair that are under way at once have
    different tags, or come in the order in which they were sent.
    """
    sent = {peer: x.contiguous() for peer, x in sends.items()}
    for x in receives.values():
        assert x.is_contiguous()
    operations = [
        dist.P2POp(dist.irecv, x, group=group, group_peer=peer, tag=tag) for peer, x in receives.items() if x.numel()
    ] + [dist.P2POp(dist.isend, x, group=group, group_peer=peer, tag=tag) for peer, x in sent.items() if x.numel()]
    what = f"exchange (to {', '.join(map(str, sent)) or 'none'}, from {', '.join(map(str, receives)) or 'none'})"
    works: list[dist.Work] = []
    if operations:
        with _named(what, current_layer()):
            works = dist.batch_isend_irecv(operations)
        count("exchange", sum(x.nbytes for x in receives.values()))
    return Pending(what, works, None, sent)

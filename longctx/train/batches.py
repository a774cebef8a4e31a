"""Batches of this rank from the stream of packed sequences, with the next step prefetched in a thread."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from longctx.data.blend import BlendedStream
from longctx.data.loader import Sequence
from longctx.engines.base import Batch
from longctx.kernels.device import to_device
from longctx.kernels.loss import IGNORE
from longctx.parallel.layout import Layout, Order
from longctx.parallel.link_speeds import ASSUMED, Speeds
from longctx.parallel.mesh import Mesh


def to_batch(
    sequence: Sequence,
    mesh: Mesh,
    order: Order,
    device: torch.device,
    *,
    attention: str = "auto",
    states: str = "all-gather",
    speeds: Speeds = ASSUMED,
) -> Batch:
    """Shard a sequence to this rank, and to the virtual ranks that it hosts.

    Labels are shifted beforehand: the last label of a slice is on another rank.
    """
    schedules: dict[str, Any] = {"attention": attention, "states": states, "speeds": speeds}
    bounds = sequence.cu_seqlens.tolist()
    layout = Layout.on(mesh, bounds, order, sequence=sequence.index, **schedules)
    tokens, labels = layout.shard(sequence.tokens[None]), layout.shard(sequence.labels[None], fill=IGNORE)
    virtual = tuple(to_batch(sequence, each, order, device, **schedules) for each in mesh.virtual)
    return Batch(to_device(tokens, device), to_device(labels, device), layout, virtual)


@dataclass(frozen=True)
class Cursor:
    """Data cursor: the number of sequences read over all ranks, valid on any number of ranks."""

    sequences: int

    def step(self, sequences_per_step: int, dp: int, dp_rank: int) -> range:
        """Return the indices of the sequences that a data-parallel rank reads in the next step."""
        return range(self.sequences + dp_rank, self.sequences + sequences_per_step, dp)

    def after(self, sequences_per_step: int) -> "Cursor":
        """Return the cursor after that step."""
        return Cursor(self.sequences + sequences_per_step)


class Prefetcher:
    """Reads the sequences of the next step in a thread during the current step."""

    def __init__(self, stream: BlendedStream, make: Callable[[Sequence], Batch]) -> None:
        self._stream, self._make = stream, make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: dict[tuple[int, ...], Future[list[Sequence]]] = {}

    def _read(self, numbers: Iterable[int]) -> list[Sequence]:
        return [self._stream[number] for number in numbers]

    def request(self, numbers: range) -> None:
        """Start reading these sequences."""
        self._pending[tuple(numbers)] = self._thread.submit(self._read, numbers)

    def take(self, numbers: range) -> list[Batch]:
        """Return the batches of these sequences. Raises UserError if the corpus cannot be read."""
        if tuple(numbers) not in self._pending:
            self.request(numbers)
        return [self._make(sequence) for sequence in self._pending.pop(tuple(numbers)).result()]

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)

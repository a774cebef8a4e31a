"""Cost model of attention schedules: compute, bytes and latency, from which `auto` chooses the fastest one.

With r the compute of the rank that has most, and c the bytes that it receives, both in seconds at the given speeds,
forward and backward together:

    all-gather   r + c / s + max(0, c (1 - 1/s) - r)     s slices of heads: the first is exposed, the others overlap
    ring         r + max(0, c - r (1 - 1/n))             n steps: communication overlaps with the first n - 1 of them
    ulysses      r + c                                   nothing overlaps, and every rank has the same compute
    2-D          Ulysses within groups, plus ring or all-gather between them

plus the latency of each call of a collective, and of each hop within one. Arithmetic is `7 (K + V)` operations per head
and visible query-key pair (2 forward and 5 backward products of K or V numbers; Dao 2023, FlashAttention-2). All ranks
compute the estimates from the same numbers, and so choose the same schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from longctx.kernels.attention.block import Mask
from longctx.parallel.attention.all_gather import HEAD_SLICES
from longctx.parallel.attention.ulysses import HeadPartition
from longctx.parallel.attention.visibility import KVOwners, row_count
from longctx.parallel.layout import Layout


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer: heads, their dims, bytes per element, and the mask."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    element_size: int
    mask: Mask


@dataclass(frozen=True)
class ScheduleEstimate:
    """The expected time of a schedule on the slowest rank, forward and backward, in seconds."""

    schedule: str
    compute: float
    exposed: float
    """Communication that does not overlap with computation, latencies included."""
    received: int
    """Bytes that the rank with most traffic receives."""

    @property
    def seconds(self) -> float:
        """Return the expected time, in seconds."""
        return self.compute + self.exposed

    def __str__(self) -> str:
        return (
            f"{self.schedule} {1e3 * self.seconds:.3g} ms ({1e3 * self.compute:.3g} ms compute, "
            f"{1e3 * self.exposed:.3g} ms exposed communication, {self.received / 2**20:.3g} MiB)"
        )


class _Model:
    """The estimates of one layer on one layout."""

    def __init__(self, layout: Layout, shape: AttentionShape) -> None:
        self.layout, self.shape, self.speeds = layout, shape, layout.speeds
        self.kv = layout.local_length * shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.element_size
        """Bytes of the keys and values of a rank."""

    def owners(self, ulysses: int) -> KVOwners:
        return KVOwners.of(self.layout, ulysses, self.shape.mask)

    def kv_heads(self, ulysses: int) -> int:
        return HeadPartition(self.shape.heads, self.shape.kv_heads, ulysses).most_keys

    def compute(self, pairs: int, ulysses: int) -> float:
        shape = self.shape
        return 7.0 * pairs * (shape.key_dim + shape.value_dim) * shape.heads / ulysses / self.speeds.flops

    def all_gather(self, ulysses: int) -> ScheduleEstimate:
        owners, speeds = self.owners(ulysses), self.speeds
        others = len(owners.pieces) - 1
        kv_heads = self.kv_heads(ulysses)
        keys = others * ulysses * self.kv * kv_heads // self.shape.kv_heads
        # Gathered forward and backward; gradients are summed in at least 4 bytes per element.
        received = 2 * keys + keys * max(4, self.shape.element_size) // self.shape.element_size
        slices = min(HEAD_SLICES, kv_heads)
        compute = self.compute(max(owners.score_elements), ulysses)
        seconds = received / speeds.bandwidth
        exposed = seconds / slices + max(0.0, seconds * (1 - 1 / slices) - compute)
        return ScheduleEstimate("all-gather", compute, exposed + 3 * slices * others * speeds.latency, received)

    def ring(self, ulysses: int) -> ScheduleEstimate:
        owners, speeds = self.owners(ulysses), self.speeds
        size = len(owners.pieces)
        rows = [
            [row_count(owners.needed(reader, (reader - d) % size)) for d in range(1, size)] for reader in range(size)
        ]
        sent = [sum(rows[(source + d) % size][d - 1] for d in range(1, size)) for source in range(size)]
        kv_heads = self.kv_heads(ulysses)
        row = kv_heads * (self.shape.key_dim + self.shape.value_dim) * self.shape.element_size
        worst = ScheduleEstimate("ring", 0.0, 0.0, 0)
        received = 0
        for reader in range(size):
            compute = self.compute(owners.score_elements[reader], ulysses)
            bytes_ = (2 * sum(rows[reader]) + sent[reader]) * row
            received = max(received, bytes_)
            steps = 1 + sum(1 for number in rows[reader] if number)
            exposed = max(0.0, bytes_ / speeds.bandwidth - compute * (1 - 1 / steps))
            exposed += 3 * (steps - 1) * speeds.latency
            if compute + exposed > worst.seconds:
                worst = ScheduleEstimate("ring", compute, exposed, bytes_)
        return ScheduleEstimate("ring", worst.compute, worst.exposed, received)

    def ulysses(self, size: int) -> ScheduleEstimate:
        """Estimate the two all-to-alls between tokens and heads, forward and backward."""
        shape = self.shape
        row = (shape.heads // size + self.kv_heads(size)) * (shape.key_dim + shape.value_dim)
        received = 2 * (size - 1) * self.layout.local_length * row * shape.element_size
        exposed = received / self.speeds.bandwidth + 4 * self.speeds.latency
        return ScheduleEstimate("ulysses", 0.0, exposed, received)

    def with_ulysses(
        self, name: str, ranks: int, between: Callable[[int], ScheduleEstimate] | None
    ) -> ScheduleEstimate:
        """Estimate Ulysses in groups of `ranks`, and the schedule between groups where there are several."""
        inner = self.ulysses(ranks)
        if between is None:
            compute = self.compute(sum(self.owners(ranks).score_elements), ranks)
            return replace(inner, schedule=name, compute=compute)
        outer = between(ranks)
        return ScheduleEstimate(name, outer.compute, inner.exposed + outer.exposed, inner.received + outer.received)


def fitting(heads: int, size: int, ulysses: int) -> list[str]:
    """List the schedules for `heads` query heads over `size` ranks, which are ulysses x ring ranks."""
    schedules = ["all-gather", "ring"]
    if heads % size == 0:
        schedules.append("ulysses")
    if 1 < ulysses < size and heads % ulysses == 0:
        schedules += ["ulysses-ring", "ulysses-all-gather"]
    return schedules


def estimates(layout: Layout, shape: AttentionShape) -> list[ScheduleEstimate]:
    """Estimate every schedule that the ranks and heads allow; the fastest first."""
    model, inner = _Model(layout, shape), 1 if layout.grid is None else layout.grid.ulysses
    estimate: dict[str, Callable[[], ScheduleEstimate]] = {
        "all-gather": lambda: model.all_gather(1),
        "ring": lambda: model.ring(1),
        "ulysses": lambda: model.with_ulysses("ulysses", layout.size, None),
        "ulysses-ring": lambda: model.with_ulysses("ulysses-ring", inner, model.ring),
        "ulysses-all-gather": lambda: model.with_ulysses("ulysses-all-gather", inner, model.all_gather),
    }
    schedules = fitting(shape.heads, layout.size, inner)
    return sorted((estimate[name]() for name in schedules), key=lambda each: each.seconds)


@dataclass(frozen=True)
class ScheduleChoice:
    """A chosen schedule in words."""

    brief: str
    """`ring, 21.3 ms estimated`."""
    details: str
    """The same with the parts of the estimate, and the estimates of the alternatives, in one line."""

    @classmethod
    def of(cls, ranked: Sequence[ScheduleEstimate]) -> "ScheduleChoice":
        """Describe the first of `ranked`, the chosen one, and the others."""
        best, *others = ranked
        alternatives = f"; alternatives: {', '.join(map(str, others))}" if others else ""
        brief = f"{best.schedule}, {1e3 * best.seconds:.3g} ms estimated"
        return cls(brief, f"{best}, estimated{alternatives}")

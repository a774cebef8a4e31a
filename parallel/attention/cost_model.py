"""Choosing the schedule of softmax attention: a cost model of bytes, latency and arithmetic.

With r the arithmetic of the rank that has most of it and c what it receives, in seconds at the speeds given, forward
and backward together:

    all-gather   r + c / s + max(0, c (1 - 1/s) - r)     s slices of heads: the first is waited for, the others overlap
    ring         r + max(0, c - r (1 - 1/n))             n steps: there is nothing to compute with but after the first
    ulysses      r + c                                   nothing overlaps, and every rank has the same arithmetic
    two kinds    Ulysses for its part, the other for the part between groups

and for each call of a collective, or each hop inside one, its latency. Arithmetic is `7 (K + V)` operations for a head
and a query-key pair that is seen (2 forward and 5 backward products of K or V numbers, Dao 2023, FlashAttention-2).
All ranks work it out from the same numbers, and come to the same answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longctx.parallel.attention.all_gather import HEAD_SLICES
from longctx.parallel.attention.ulysses import HeadPartition
from longctx.parallel.attention.visibility import KVOwners, Reach, count
from longctx.parallel.layout import Layout


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention: query heads, key/value heads, their widths, bytes of a number, and what is seen."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    number: int
    reach: Reach


@dataclass(frozen=True)
class Estimate:
    """What a schedule is expected to take on the slowest rank, forward and backward, in seconds."""

    schedule: str
    arithmetic: float
    exposed: float
    """Communication that nothing is computed beside, latencies included."""
    received: int
    """Bytes that a rank receives, of the one that receives most."""

    @property
    def seconds(self) -> float:
        """All together."""
        return self.arithmetic + self.exposed

    def __str__(self) -> str:
        return (
            f"{self.schedule} {1e3 * self.seconds:.3g} ms ({1e3 * self.arithmetic:.3g} ms arithmetic, "
            f"{1e3 * self.exposed:.3g} ms exposed communication, {self.received / 2**20:.3g} MiB)"
        )


class _Model:
    """The estimates of one layer on one layout."""

    def __init__(self, layout: Layout, shape: AttentionShape) -> None:
        self.layout, self.shape, self.speeds = layout, shape, layout.speeds
        self.kv = layout.local_length * shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.number
        """Bytes of the keys and values of a rank."""

    def owners(self, ulysses: int) -> KVOwners:
        return KVOwners.of(self.layout, ulysses, self.shape.reach)

    def kv_heads(self, ulysses: int) -> int:
        return HeadPartition(self.shape.heads, self.shape.kv_heads, ulysses).most_keys

    def arithmetic(self, pairs: int, ulysses: int) -> float:
        shape = self.shape
        return 7.0 * pairs * (shape.key_dim + shape.value_dim) * shape.heads / ulysses / self.speeds.flops

    def all_gather(self, ulysses: int) -> Estimate:
        owners, speeds = self.owners(ulysses), self.speeds
        others = len(owners.numbers) - 1
        kv_heads = self.kv_heads(ulysses)
        keys = others * ulysses * self.kv * kv_heads // self.shape.kv_heads
        # Gathered forward and backward; gradients are summed in at least 4 bytes.
        received = 2 * keys + keys * max(4, self.shape.number) // self.shape.number
        slices = min(HEAD_SLICES, kv_heads)
        arithmetic = self.arithmetic(max(owners.score_elements), ulysses)
        seconds = received / speeds.bandwidth
        exposed = seconds / slices + max(0.0, seconds * (1 - 1 / slices) - arithmetic)
        return Estimate("all-gather", arithmetic, exposed + 3 * slices * others * speeds.latency, received)

    def ring(self, ulysses: int) -> Estimate:
        owners, speeds = self.owners(ulysses), self.speeds
        size = len(owners.numbers)
        rows = [[count(owners.needed(reader, (reader - d) % size)) for d in range(1, size)] for reader in range(size)]
        sent = [sum(rows[(source + d) % size][d - 1] for d in range(1, size)) for source in range(size)]
        kv_heads = self.kv_heads(ulysses)
        row = kv_heads * (self.shape.key_dim + self.shape.value_dim) * self.shape.number
        worst = Estimate("ring", 0.0, 0.0, 0)
        received = 0
        for reader in range(size):
            arithmetic = self.arithmetic(owners.score_elements[reader], ulysses)
            bytes_ = (2 * sum(rows[reader]) + sent[reader]) * row
            received = max(received, bytes_)
            steps = 1 + sum(1 for number in rows[reader] if number)
            exposed = max(0.0, bytes_ / speeds.bandwidth - arithmetic * (1 - 1 / steps))
            exposed += 3 * (steps - 1) * speeds.latency
            if arithmetic + exposed > worst.seconds:
                worst = Estimate("ring", arithmetic, exposed, bytes_)
        return Estimate("ring", worst.arithmetic, worst.exposed, received)

    def ulysses(self, size: int) -> Estimate:
        """The two changes of heads for tokens, there and back."""
        shape = self.shape
        row = (shape.heads // size + self.kv_heads(size)) * (shape.key_dim + shape.value_dim)
        received = 2 * (size - 1) * self.layout.local_length * row * shape.number
        exposed = received / self.speeds.bandwidth + 4 * self.speeds.latency
        return Estimate("ulysses", 0.0, exposed, received)

    def both(self, name: str, inner: int, across: Callable[[int], Estimate] | None) -> Estimate:
        """Ulysses over `inner` ranks and another schedule between groups, or nothing more."""
        first = self.ulysses(inner)
        if across is None:
            return Estimate(
                name, self.arithmetic(sum(self.owners(inner).score_elements), inner), first.exposed, first.received
            )
        second = across(inner)
        return Estimate(name, second.arithmetic, first.exposed + second.exposed, first.received + second.received)


def fitting(heads: int, size: int, ulysses: int) -> list[str]:
    """The schedules that `size` ranks = ulysses x ring and that many query heads allow."""
    found = ["all-gather", "ring"]
    if heads % size == 0:
        found.append("ulysses")
    if 1 < ulysses < size and heads % ulysses == 0:
        found += ["ulysses-ring", "ulysses-all-gather"]
    return found


def estimates(layout: Layout, shape: AttentionShape) -> list[Estimate]:
    """Every schedule that the ranks and heads allow, the one that is expected to be fastest first."""
    model, inner = _Model(layout, shape), 1 if layout.grid is None else layout.grid.ulysses
    made: dict[str, Callable[[], Estimate]] = {
        "all-gather": lambda: model.all_gather(1),
        "ring": lambda: model.ring(1),
        "ulysses": lambda: model.both("ulysses", layout.size, None),
        "ulysses-ring": lambda: model.both("ulysses-ring", inner, model.ring),
        "ulysses-all-gather": lambda: model.both("ulysses-all-gather", inner, model.all_gather),
    }
    found = [made[name]() for name in fitting(shape.heads, layout.size, inner)]
    return sorted(found, key=lambda estimate: estimate.seconds)


def explained(found: Sequence[Estimate]) -> str:
    """What was chosen and why, in a line."""
    best, *others = found
    return f"{best}" + (f"; instead of {', '.join(map(str, others))}" if others else "")

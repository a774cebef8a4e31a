"""Clock offsets between nodes, from round trips of messages (Cristian's algorithm)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longctx.doctor.findings import Finding
from longctx.doctor.units import duration
from longctx.parallel.collectives import all_gather, exchange

REPEATS = 20
SKEWED, BROKEN = 1.0, 300.0
"""Seconds: file times and the order of log lines mislead; Kerberos refuses, S3 does at 900 s."""


@dataclass(frozen=True)
class Offset:
    """How far a clock is ahead of rank 0's, in seconds: `offset` ± `uncertainty`."""

    offset: float
    uncertainty: float


def measure_offsets(leaders: Sequence[int], now: Callable[[], int] = time.time_ns) -> list[Offset]:
    """Return the offset of the clock of each of `leaders`, one rank per node, from that of the first. Collective.

    The first asks each of the others for its time; that lies between sending and receiving, and at their midpoint if
    both ways take as long. The round trip that took least counts. `now`: nanoseconds since the epoch.
    """
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None  # the default group exists
    first, offsets = leaders[0], [Offset(0.0, 0.0)]
    for other in leaders[1:]:
        trips = []
        for _ in range(REPEATS):
            message = torch.zeros(1, dtype=torch.int64)
            if rank == first:
                began = now()
                exchange({other: message}, {}, group).wait()
                exchange({}, {other: message}, group).wait()
                trips.append(from_round_trip(began, int(message), now()))
            elif rank == other:
                exchange({}, {first: message}, group).wait()
                exchange({first: torch.tensor([now()])}, {}, group).wait()
        offsets.append(min(trips, key=lambda trip: trip.uncertainty, default=Offset(0.0, 0.0)))
    table = torch.tensor([[one.offset, one.uncertainty] for one in offsets], dtype=torch.float64)
    return [Offset(offset, uncertainty) for offset, uncertainty in all_gather(table).wait()[first].tolist()]


def from_round_trip(sent: int, answered: int, received: int) -> Offset:
    """Return the offset of the clock that says `answered`; all in nanoseconds, `sent` and `received` by this clock."""
    return Offset((answered - (sent + received) / 2) / 1e9, (received - sent) / 2 / 1e9)


def check_clocks(offsets: Sequence[Offset], names: Sequence[str]) -> list[Finding]:
    """Check the clocks of nodes, by their names, against that of the first; none for a single node."""
    if len(offsets) == 1:
        return []
    ahead = [abs(one.offset) - one.uncertainty for one in offsets]
    skewed = [number for number, seconds in enumerate(ahead) if seconds > SKEWED]
    if not skewed:
        widest = max(offsets, key=lambda one: abs(one.offset))
        return [Finding("clocks", f"within {duration(abs(widest.offset))} ± {duration(widest.uncertainty)}")]
    # If most clocks differ from the first one, the message still says by how much, whichever of them is right.
    return [
        Finding(
            "clocks",
            f"{duration(abs(offsets[number].offset))} {'ahead of' if offsets[number].offset > 0 else 'behind'} "
            f"{names[0]} (± {duration(offsets[number].uncertainty)})",
            "wrong" if ahead[number] > BROKEN else "warning",
            "let chrony or systemd-timesyncd run on every node (chronyc tracking): logs get out of order, and object "
            "stores and Kerberos refuse clocks that are minutes off",
            names[number],
        )
        for number in skewed
    ]

"""Contract of a tracker, and what it is told of its run when it is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from longctx.engines.metrics import RunInfo

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ended: after its last step; earlier, by a signal, with a checkpoint; with an error."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker records."""

    name: str
    """The recipe's."""
    recipe: dict[str, Any]
    """The resolved recipe, as JSON."""
    out: Path
    """The run's directory."""
    after_step: int
    """The step from which the run resumes; 0 for a fresh start."""
    previous_id: str | None
    """The id that the tracker gave to the run at an earlier start; None: a fresh start, or it gave none."""


@dataclass(frozen=True)
class Point:
    """Scalars of one step."""

    step: int
    time: float
    """When they were recorded, in seconds since the epoch."""
    scalars: dict[str, float]
    """By name, as in `longctx.tracking.scalars`."""


class Tracker(Protocol):
    """One tracker of one run. Its methods are called from one thread, may take long, and may raise anything."""

    run_id: str | None
    """The id by which the tracker continues this run at a later start; None: it needs none."""
    where: str
    """Where the run is to be seen, for people: a URL or a folder; empty if that needs no word."""
    advice: str
    """What to do about records that did not arrive; empty if there is nothing."""

    def describe(self, info: RunInfo) -> None:
        """Record constants of the run, which may differ from those of an earlier start."""

    def write(self, points: Sequence[Point]) -> None:
        """Record points; again if an earlier call with them failed. Steps before a resume may come again."""

    def close(self, outcome: Outcome) -> None:
        """Deliver what was written, and record how the run ended."""

"""Diagnosis of a hang from heartbeats: which rank did not arrive, where it is, and who waits for it.

A job hangs if

- a rank is silent (its process is stopped, or its machine does not answer) and another has waited for its patience, or
  is overdue in its phase; or every rank is silent;
- a rank waits for others and is overdue in its phase.

Ranks that are all busy are slow, not hanging: a first step may compile for longer than any limit.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from longctx.health.beat import STACKS, Beat


@dataclass
class _Seen:
    beat: Beat
    since: float
    """When this report was first seen, by the watcher's clock."""


class Watcher:
    """Follows the heartbeats of a job's ranks. Compares no clock of one machine with that of another."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, _Seen] = {}

    def update(self, beats: Mapping[int, Beat]) -> str | None:
        """Take the last report of each rank; return the diagnosis if the job hangs, as sentences, else None."""
        now = self._clock()
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank].beat != beat:
                self._seen[rank] = _Seen(beat, now)
        running = {rank: self._seen[rank] for rank, beat in beats.items() if beat.phase}
        silent = self.silent & running.keys()
        if silent and len(silent) == len(running):
            return self._all_are_silent(running, now)
        awake = {rank: seen.beat for rank, seen in running.items() if rank not in silent}
        waiting = {rank: beat for rank, beat in awake.items() if beat.collective}
        if silent and any(beat.waited >= beat.patience or beat.is_overdue for beat in awake.values()):
            said = [self._silence(rank, running[rank], now) for rank in sorted(silent)]
            return " ".join([*said, *_who_waits(waiting)])
        if any(beat.is_overdue for beat in waiting.values()):
            return _who_is_late(awake, waiting)
        return None

    @property
    def silent(self) -> set[int]:
        """The ranks that do not report any more."""
        now = self._clock()
        return {rank for rank, seen in self._seen.items() if now - seen.since >= seen.beat.patience}

    def _all_are_silent(self, running: Mapping[int, _Seen], now: float) -> str:
        latest = max(running, key=lambda rank: running[rank].since)
        return f"No rank reports any more. The last to report: {self._silence(latest, running[latest], now)}"

    def _silence(self, rank: int, seen: _Seen, now: float) -> str:
        beat = seen.beat
        return (
            f"{_name(rank, beat)} has not reported for {now - seen.since:.0f} s: its process is stopped, or its "
            f"machine does not answer. Its last report: {_position(beat)}."
        )


def _who_is_late(awake: Mapping[int, Beat], waiting: Mapping[int, Beat]) -> str:
    """Describe the hang of ranks that all report."""
    late = {rank: beat for rank, beat in awake.items() if not beat.collective}
    if not late:
        phase, waited = max((beat.phase, beat.waited) for beat in waiting.values())
        places = "; ".join(f"{ranks} in {where}" for ranks, where in _by_place(waiting))
        return f"{phase}: all ranks have waited for each other, for {waited:.0f} s: {places}."
    limit = max(beat.limit for beat in waiting.values() if beat.is_overdue)
    said = [
        f"{_name(rank, beat)} did not arrive within {limit:.0f} s: {_position(beat)}." for rank, beat in late.items()
    ]
    return " ".join([*said, *_who_waits(waiting)])


def _who_waits(waiting: Mapping[int, Beat]) -> list[str]:
    places = [f"{ranks} {_verb(ranks)} in {where}" for ranks, where in _by_place(waiting)]
    return [f"{'; '.join(places)}."] if places else []


def _verb(ranks: str) -> str:
    return "wait" if ranks.startswith("ranks") else "waits"


def _by_place(waiting: Mapping[int, Beat]) -> list[tuple[str, str]]:
    ranks_at: dict[str, list[int]] = {}
    for rank, beat in sorted(waiting.items()):
        ranks_at.setdefault(f"{beat.phase}, {beat.collective}", []).append(rank)
    return [(name_ranks(ranks), where) for where, ranks in ranks_at.items()]


def _position(beat: Beat) -> str:
    doing = f"waiting in {beat.collective}" if beat.collective else f"at {beat.where}"
    return f"{beat.phase}, {doing}"


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} (process {beat.pid} on {beat.host})"


def stacks_text(logs: Path) -> str:
    """Return a sentence, after a space, about the stacks that ranks have written into a folder; empty if none has."""
    pattern = STACKS.format("*")
    return f" Stacks of the ranks that answer: {logs}/{pattern}." if any(logs.glob(pattern)) else ""


def name_ranks(ranks: Sequence[int]) -> str:
    """Write ascending ranks with runs of neighbours joined: `rank 3`, `ranks 0-3, 6`."""
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"ranks {text}" if len(ranks) > 1 else f"rank {text}"

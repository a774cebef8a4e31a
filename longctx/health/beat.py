"""Heartbeat of a rank: what it does and since when, as it reports it to whoever watches the job.

Imports nothing heavy: the launcher reads heartbeats too.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

FOLDER = "LONGCTX_HEARTBEATS"
"""Environment variable: the folder in which the ranks of a job on one machine report, if their launcher watches it."""
STACKS = "rank-{}.stacks"
"""Name of the file of a rank's stacks, in the run's folder of logs."""
_HANG = "hang"


@dataclass(frozen=True)
class Beat:
    """One report of a rank. Times are in seconds."""

    number: int
    """Counts the reports: the next one differs."""
    host: str
    pid: int
    phase: str
    """What the run does, such as `step 12`; empty after its end."""
    elapsed: float
    """Time in this phase."""
    limit: float
    """Time in this phase after which the rank is overdue."""
    patience: float
    """Time without a report after which the rank is silent."""
    collective: str
    """The collective in which it waits, with its layer; empty if it does not wait."""
    waited: float
    """Time in this collective."""
    where: str
    """The innermost line of longctx that runs, `file:line in function`."""

    @property
    def is_overdue(self) -> bool:
        """Whether the phase takes longer than it should."""
        return self.elapsed > self.limit


class Board(Protocol):
    """Where the ranks of a job report, and where a hang is declared."""

    is_watched: bool
    """Whether a launcher watches; otherwise the ranks do themselves."""

    def post(self, rank: int, beat: Beat) -> None:
        """Report. Raises OSError or RuntimeError if the board does not answer."""

    def read(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """Return the last report of each rank that has reported. Raises OSError or RuntimeError."""

    def declare_hang(self) -> None:
        """Ask every rank to write its stacks. Raises OSError or RuntimeError."""

    def is_hang_declared(self) -> bool:
        """Return whether `declare_hang` was called. Raises OSError or RuntimeError."""


_BEAT = TypeAdapter(Beat)


def encode(beat: Beat) -> bytes:
    """Return a report as JSON."""
    return _BEAT.dump_json(beat)


def decode(content: bytes) -> Beat | None:
    """Return the report in `content`, None if it is none."""
    with suppress(ValidationError):
        return _BEAT.validate_json(content)
    return None


class FolderBoard:
    """A board of files in a folder that the ranks and their launcher share."""

    is_watched = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def post(self, rank: int, beat: Beat) -> None:
        """Report: see Board."""
        path = self._path(rank)
        draft = path.with_suffix(".draft")
        draft.write_bytes(encode(beat))
        draft.replace(path)

    def read(self, ranks: Sequence[int]) -> dict[int, Beat]:
        """Return reports: see Board."""
        beats = {}
        for rank in ranks:
            with suppress(FileNotFoundError):
                beat = decode(self._path(rank).read_bytes())
                if beat is not None:
                    beats[rank] = beat
        return beats

    def declare_hang(self) -> None:
        """Ask for stacks: see Board."""
        (self._folder / _HANG).touch()

    def is_hang_declared(self) -> bool:
        """Return whether stacks are asked for: see Board."""
        return (self._folder / _HANG).exists()

    def _path(self, rank: int) -> Path:
        return self._folder / f"heartbeat-{rank}.json"

"""Directory of a run: whether all nodes share it, its free space, and its write and read speed."""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from longctx.doctor.findings import Finding, few
from longctx.doctor.ranks import Places, gather, no_step
from longctx.doctor.units import rate, size
from longctx.hardware_profile import Disk

FILE_BYTES = 256 * 2**20
"""Bytes that each rank writes."""
_SHARE_OF_FREE = 0.25
"""Share of the free space that the measurement takes at most."""
_BLOCK = 2**20
_PATIENCE = 5.0
"""Seconds within which a file of one node appears on the others."""
_FULL, _LEAST_FREE = 2**30, 10 * 2**30


@dataclass(frozen=True)
class DiskFacts:
    """What the ranks found, each in rank order where there are several."""

    path: str
    errors: dict[int, str]
    """Why ranks could not write or read, by rank."""
    blind: tuple[int, ...]
    """Ranks that do not see the file that rank 0 wrote."""
    free: int
    """Free bytes, on rank 0; 0 if the directory could not be made."""
    file_bytes: int
    """Bytes that each rank wrote; 0: none did."""
    write: float
    """Bytes per second of all ranks together; 0: not measured."""
    read: float


def measure_disk(
    directory: Path,
    places: Places,
    rank: int,
    file_bytes: int = FILE_BYTES,
    patience: float = _PATIENCE,
    step: Callable[[], None] = no_step,
) -> DiskFacts:
    """Measure the directory with all ranks, each of which writes a file of `file_bytes`, fewer if space is short.

    Rank 0 makes the directory if there is none, and removes everything that was made at the end. A rank waits
    `patience` seconds for the files of others. `step` is called before each measurement. Collective; every rank returns
    the same.
    """
    made: list[Path] = []
    trial = directory / f".longctx-doctor-{gather(secrets.token_hex(8))[0]}"
    try:
        facts = _measure(directory, trial, made, places, rank, file_bytes, patience, step)
        gather(None)  # nobody reads any more
        return facts
    finally:
        if rank == 0:
            shutil.rmtree(trial, ignore_errors=True)
            for folder in reversed(made):
                with suppress(OSError):  # something else was put there meanwhile
                    folder.rmdir()


def _measure(
    directory: Path,
    trial: Path,
    made: list[Path],
    places: Places,
    rank: int,
    file_bytes: int,
    patience: float,
    step: Callable[[], None],
) -> DiskFacts:
    errors: dict[int, str] = {}

    def together(act: Callable[[], float]) -> list[float]:
        """Act on all ranks; 0 where it fails. A rank that failed before does not take part."""
        step()
        value, error = 0.0, ""
        if rank not in errors:
            try:
                value = act()
            except OSError as caught:
                error = f"{type(caught).__name__}: {caught.strerror or caught}"
        results = gather((value, error))
        for number, (_, text) in enumerate(results):
            if text:
                errors[number] = text
        return [number for number, _ in results]

    def begin() -> float:
        if rank == 0:
            missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            trial.mkdir()
            _write(trial / "nonce", _BLOCK)
            return float(shutil.disk_usage(directory).free)
        return 0.0

    free = int(together(begin)[0])
    if errors:
        return DiskFacts(str(directory), errors, (), 0, 0, 0.0, 0.0)
    seen = together(lambda: float(_appears(trial / "nonce", patience)))
    blind = tuple(number for number, is_seen in enumerate(seen) if not is_seen)
    file_bytes = min(file_bytes, int(_SHARE_OF_FREE * free) // places.size) // _BLOCK * _BLOCK
    if blind or file_bytes < _BLOCK:
        return DiskFacts(str(directory), errors, blind, free, 0, 0.0, 0.0)

    other = places.counterpart(rank)
    written = together(lambda: _timed(lambda: _write(trial / str(rank), file_bytes)))
    # A file of another node is not in this one's page cache.
    was_read = [0.0] if errors else together(lambda: _timed(lambda: _read(trial / str(other))))
    if errors:
        return DiskFacts(str(directory), errors, blind, free, 0, 0.0, 0.0)
    total = file_bytes * places.size
    return DiskFacts(str(directory), errors, blind, free, file_bytes, total / max(written), total / max(was_read))


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _appears(file: Path, patience: float) -> bool:
    """Return whether a file is there, within `patience` seconds: network file systems remember what was not."""
    end = time.monotonic() + patience
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _write(file: Path, count: int) -> None:
    """Write a file of whole blocks durably, of bytes that no file system compresses."""
    block = secrets.token_bytes(_BLOCK)
    with file.open("wb", buffering=0) as stream:
        for _ in range(count // _BLOCK):
            stream.write(block)
        os.fsync(stream.fileno())


def _read(file: Path) -> None:
    """Read a file, from the disk if the kernel drops its copy in memory."""
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while stream.read(_BLOCK):
            pass


def check_disk(facts: DiskFacts, places: Places, names: list[str], needed: int | None = None) -> list[Finding]:
    """Check the directory.

    `names`: the name of each rank's node. `needed`: bytes that a checkpoint may take; None: 10 GiB.
    """
    if facts.errors:
        rank, error = min(facts.errors.items())
        on = few(dict.fromkeys(names[rank] for rank in sorted(facts.errors)))
        remedy = f"rank {rank} failed: give --out a directory in which this user may write, and that is not full"
        return [Finding("run directory", f"{facts.path}: {error}", "wrong", remedy, on)]
    return [
        *_sharing(facts, places, names),
        _space(facts, needed or _LEAST_FREE),
        *_speeds(facts),
    ]


def _sharing(facts: DiskFacts, places: Places, names: list[str]) -> list[Finding]:
    if facts.blind:
        on = few(dict.fromkeys(names[rank] for rank in facts.blind))
        remedy = "a checkpoint is one directory that all ranks write: give --out a directory on a shared file system"
        value = f"{facts.path} is not the same directory as on {names[0]}"
        return [Finding("run directory", value, "wrong", remedy, on)]
    where = "" if len(places.nodes) == 1 else f", shared by {len(places.nodes)} nodes"
    return [Finding("run directory", f"{facts.path}{where}")]


def _space(facts: DiskFacts, needed: int) -> Finding:
    value = f"{size(facts.free)} free"
    if facts.free >= needed:
        return Finding("free space", value)
    return Finding(
        "free space",
        value,
        "wrong" if facts.free < _FULL else "warning",
        f"checkpoints may take {size(needed)} or more: free some, choose another --out, or lower checkpoint.keep",
    )


def _speeds(facts: DiskFacts) -> list[Finding]:
    if facts.file_bytes == 0:
        return []
    per_rank = f"all ranks together, {size(facts.file_bytes)} each"
    return [
        Finding("disk write", f"{rate(facts.write)} with fsync, {per_rank}"),
        Finding("disk read", rate(facts.read)),
    ]


def to_profile(facts: DiskFacts) -> Disk | None:
    """Return the part of the profile; None if nothing was written."""
    if facts.file_bytes == 0:
        return None
    return Disk(
        path=facts.path,
        free=facts.free,
        file_bytes=facts.file_bytes,
        write=facts.write,
        read=facts.read,
    )

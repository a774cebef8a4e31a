"""The run directory: speeds, and directories that are not shared, not writable, or full."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch.distributed as dist

from longctx.doctor import disk
from longctx.doctor.disk import DiskFacts, check_disk, measure_disk, to_profile
from longctx.doctor.ranks import Places
from longctx.parallel.local_ranks import LocalRanks

MIB, GIB = 2**20, 2**30
NAMES = ["a", "b"]
TWO = Places(((0,), (1,)))
GOOD = DiskFacts("/runs", {}, (), 500 * GIB, 256 * MIB, 2e9, 3e9)


def measure(directories: list[str], places: Places = TWO) -> DiskFacts:
    rank = dist.get_rank()
    return measure_disk(Path(directories[rank]), places, rank, file_bytes=2 * MIB, patience=0.05)


def bad(facts: DiskFacts, needed: int | None = None) -> list[tuple[str, str, str]]:
    found = check_disk(facts, TWO, NAMES, needed)
    return [(one.name, one.status, one.where) for one in found if one.status != "ok"]


def test_a_shared_directory_is_measured_and_left_as_it_was(ranks: LocalRanks, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    for directory in (tmp_path, tmp_path / "new" / "runs"):
        first, second = ranks.run(measure, [str(directory)] * 2, size=2)
        assert first == second
        assert (first.path, first.errors, first.blind, first.file_bytes) == (str(directory), {}, (), 2 * MIB)
        assert first.write > 0
        assert first.read > 0
        assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_directories_that_are_not_one_are_noticed(ranks: LocalRanks, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first, second = ranks.run(measure, [str(tmp_path / "own"), str(other)], size=2)
    assert first.blind == second.blind == (1,)
    assert to_profile(first) is None
    assert ("run directory", "wrong", "b") in bad(first)
    assert [file.name for file in tmp_path.iterdir()] == ["other"]
    assert list(other.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_wrong(ranks: LocalRanks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = ranks.run(measure, [str(tmp_path / "file" / "runs")] * 2, size=2)
    assert first.errors == second.errors == {0: "NotADirectoryError: Not a directory"}
    assert bad(first) == [("run directory", "wrong", "a")]


def measure_read_only(directory: str) -> DiskFacts:
    """Rank 1 cannot write."""

    def refuse(file: Path, count: int) -> None:
        if file.name == "1":
            raise OSError(30, "Read-only file system", str(file))
        written(file, count)

    written = disk._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "_write", refuse)
        return measure([directory] * 2)


def test_a_rank_that_cannot_write_is_named_and_nobody_hangs(ranks: LocalRanks, tmp_path: Path) -> None:
    first, second = ranks.run(measure_read_only, str(tmp_path), size=2)
    assert first == second
    assert first.errors == {1: "OSError: Read-only file system"}
    (found,) = check_disk(first, TWO, NAMES)
    assert (found.value, found.where) == (f"{tmp_path}: OSError: Read-only file system", "b")
    assert list(tmp_path.iterdir()) == []


Usage = namedtuple("Usage", "total used free")


def measure_full(directory: str) -> DiskFacts:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(GIB, GIB - 3 * MIB, 3 * MIB))
        return measure([directory] * 2)


def test_a_full_disk_is_not_filled_further(ranks: LocalRanks, tmp_path: Path) -> None:
    first, _ = ranks.run(measure_full, str(tmp_path), size=2)
    assert (first.file_bytes, first.errors) == (0, {})
    assert bad(first) == [("free space", "wrong", "")]


def test_a_good_directory_is_ok() -> None:
    assert bad(GOOD) == []
    assert [one.value for one in check_disk(GOOD, TWO, NAMES)] == [
        "/runs, shared by 2 nodes",
        "500.0 GiB free",
        "2 GB/s with fsync, all ranks together, 256 MiB each",
        "3 GB/s",
    ]
    profile = to_profile(GOOD)
    assert profile is not None
    assert (profile.write, profile.read, profile.free) == (2e9, 3e9, 500 * GIB)


def test_less_space_than_the_devices_have_memory_is_a_warning() -> None:
    assert bad(GOOD, needed=640 * GIB) == [("free space", "warning", "")]

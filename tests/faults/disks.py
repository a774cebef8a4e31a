"""Full disks: a plain error, and a run that is resumed when there is space computes what an undisturbed one does."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.jobs import Job
from tests.faults.faults import OVERRIDES, Kind, Trial, expect_plain, expect_resumes, run


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[None]:
    """Mount a file system of so many KiB at a folder."""
    folder.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", f"size={kib}k", "longctx-faults", folder)
    try:
        yield
    finally:
        run("umount", folder)


def _fill_the_runs_disk(trial: Trial) -> None:
    """Train into a directory whose disk is full at some time."""
    folder = trial.shared.copy(trial.folder)
    with small_disk(folder / "out", trial.random.randint(4, 700)):
        status, _, stderr = Job(folder, *OVERRIDES).wait()
        if status != 0:
            expect_plain(status, stderr)
        run("mount", "-o", "remount,size=64m", folder / "out")
        expect_resumes(trial)


KINDS = (
    Kind(
        "full-disk",
        "a disk that is full at some time; a plain error, and the resumed run is bitwise equal",
        20,
        _fill_the_runs_disk,
        needs_root=True,
    ),
)

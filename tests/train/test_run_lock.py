"""The lock of a run's directory: one owner at a time, its name in every refusal, and none that outlives its owner."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from longctx.errors import UserError
from longctx.train import run_lock
from longctx.train.run_lock import FILE_NAME, Owner, RunLock, locked, this_process

ELSEWHERE = replace(this_process(), token="e", user="ada", host="node17", machine="another", pid=4242, restarts={})
NAME = r"process 4242 of ada on node17, since"

Quick = partial(RunLock, period=0.05, patience=0.4)


def write(folder: Path, owner: Owner) -> Path:
    path = folder / FILE_NAME
    path.write_text(json.dumps(asdict(owner)))
    return path


def owner_of(folder: Path) -> Owner:
    return Owner(**json.loads((folder / FILE_NAME).read_text()))


def acquire(lock: RunLock, within: float = 5.0) -> list[str]:
    """What the lock said until it was got."""
    said: list[str] = []
    end = time.monotonic() + within
    while (waits_for := lock.try_acquire()) is not None:
        assert time.monotonic() < end, said
        said.append(waits_for)
        time.sleep(0.02)
    return list(dict.fromkeys(said))


@contextmanager
def heartbeat(path: Path) -> Iterator[None]:
    """Somebody touches the lock."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[RunLock]:
    made = Quick(tmp_path)
    yield made
    made.release()


def test_a_lock_names_its_owner_and_is_gone_after_the_run(tmp_path: Path) -> None:
    lock = Quick(tmp_path / "runs" / "mine")
    assert lock.try_acquire() is None
    owner = owner_of(tmp_path / "runs" / "mine")
    assert (owner.pid, owner.host) == (os.getpid(), os.uname().nodename)
    lock.check()
    (tmp_path / "runs" / "mine" / "recipe.toml").touch()
    lock.release()
    lock.release()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["recipe.toml"]


def test_a_directory_that_was_made_for_only_the_lock_goes_with_it(tmp_path: Path) -> None:
    lock = Quick(tmp_path / "mine")
    assert lock.try_acquire() is None
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_on_the_same_machine_is_refused_at_once(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None
    named = rf"^{re.escape(str(tmp_path))} is being trained into by process {os.getpid()} of .+, since \d{{4}}-.+--out$"
    for _ in range(20):
        second = RunLock(tmp_path)
        with pytest.raises(UserError, match=named):
            second.try_acquire()
        second.release()
        lock.check()


KEEP = """
import sys, time
from pathlib import Path
from longctx.train.run_lock import RunLock
assert RunLock(Path(sys.argv[1])).try_acquire() is None
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over_at_once(lock: RunLock, tmp_path: Path, reaped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", KEEP, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"process {process.pid} of"):
            lock.try_acquire()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(UserError, match=f"process {process.pid} of"):
            lock.try_acquire()
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        (said,) = acquire(lock)
        assert re.search(rf"was left by process {process.pid} of .+, which has ended: taking it over", said)
    assert owner_of(tmp_path).pid == os.getpid()


def test_a_process_that_has_the_number_of_the_owner_is_not_the_owner(lock: RunLock, tmp_path: Path) -> None:
    write(tmp_path, replace(this_process(), started=1))
    assert len(acquire(lock)) == 1


def test_an_owner_elsewhere_that_shows_a_heartbeat_is_left_alone(lock: RunLock, tmp_path: Path) -> None:
    path = write(tmp_path, ELSEWHERE)
    with heartbeat(path), pytest.raises(UserError, match=NAME):
        acquire(lock)
    assert owner_of(tmp_path) == ELSEWHERE


def test_an_owner_elsewhere_without_a_heartbeat_is_followed_after_a_while(lock: RunLock, tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE)
    began = time.monotonic()
    watched, taken = acquire(lock)
    assert time.monotonic() - began >= 0.4
    assert re.search(rf"is held by {NAME} .+: watching for 0\.4 s whether that run still runs", watched)
    assert re.search(rf"of {NAME} .+ had no heartbeat for 0\.4 s: taking it over", taken)
    lock.check()


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}


@pytest.mark.parametrize(
    ("environment", "restarts"),
    [
        (SLURM, {"SLURM job 7": 0}),
        ({**SLURM, **TORCHRUN}, {"SLURM job 7": 1, "torchrun job none in step 0": 1}),
    ],
)
def test_the_same_job_started_again_does_not_wait(monkeypatch, tmp_path, environment, restarts) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    write(tmp_path, replace(ELSEWHERE, restarts=restarts))
    lock = RunLock(tmp_path, patience=60.0)
    (said,) = acquire(lock)
    assert "on node17, SLURM job 7" in said
    assert said.endswith("which has ended: taking it over")
    lock.release()


@pytest.mark.parametrize(
    ("environment", "restarts"),
    [
        (SLURM, {"SLURM job 7": 1}),
        (SLURM, {"SLURM job 8": 0}),
        ({**SLURM, **TORCHRUN}, {"SLURM job 7": 1, "torchrun job none in step 1": 0}),
        (TORCHRUN, {}),
    ],
)
def test_another_job_or_the_same_start_of_a_job_has_not_ended(monkeypatch, tmp_path, environment, restarts) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path, replace(ELSEWHERE, restarts=restarts))
    lock = Quick(tmp_path)
    with heartbeat(path), pytest.raises(UserError, match="process 4242 of ada"):
        acquire(lock)
    lock.release()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def torn(path: Path) -> None:
    path.write_bytes(b'{"token": "a", "us')


def newer(path: Path) -> None:
    path.write_text(json.dumps({"key": "of a later version"}))


@pytest.mark.parametrize("make", [empty, torn, newer, os.mkfifo])
def test_a_lock_that_names_nobody_is_watched_too(lock: RunLock, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / FILE_NAME)
    watched, taken = acquire(lock)
    assert "is held by an unnamed process" in watched
    assert "had no heartbeat" in taken
    lock.check()


def test_of_many_starts_that_find_a_dead_owner_one_wins(tmp_path: Path) -> None:
    for trial in range(20):
        folder = tmp_path / str(trial)
        folder.mkdir()
        write(folder, ELSEWHERE if trial % 2 else replace(this_process(), started=1))
        locks = [RunLock(folder, period=0.02, patience=0.1) for _ in range(5)]
        won: list[RunLock] = []

        def start(lock: RunLock, won: list[RunLock] = won) -> None:
            try:
                acquire(lock)
            except UserError:
                return
            won.append(lock)

        threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].check()
        for lock in locks:
            lock.release()
        assert list(folder.iterdir()) == []


def test_a_start_that_was_suspended_before_it_wrote_its_name_does_not_take_the_lock_for_its_own(tmp_path: Path) -> None:
    """As if another start had waited for its patience, and taken the lock over, between creation and writing."""
    lock, other = Quick(tmp_path), Quick(tmp_path)
    write_of = os.write

    def write_late(descriptor: int, content: bytes) -> int:
        (tmp_path / FILE_NAME).unlink()
        with pytest.MonkeyPatch.context() as undone:
            undone.setattr(run_lock.os, "write", write_of)
            assert other.try_acquire() is None
        return write_of(descriptor, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock.os, "write", write_late)
        with pytest.raises(UserError, match="is being trained into by"):
            acquire(lock)
    other.check()
    lock.release()
    other.check()
    other.release()


def test_a_takeover_that_comes_late_leaves_the_new_owner_its_lock(lock: RunLock, tmp_path: Path) -> None:
    """As if another start had taken over between this one's reading of the stale lock and its takeover."""
    assert lock.try_acquire() is None
    late = Quick(tmp_path)
    late._take_over("the token of the stale lock")
    lock.check()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_crash_within_a_takeover_delays_the_next_one_but_does_not_prevent_it(lock: RunLock, tmp_path: Path) -> None:
    path = write(tmp_path, replace(this_process(), started=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *arguments, **options: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            Quick(tmp_path).try_acquire()
    assert len(list(tmp_path.iterdir())) == 2, "the lock and the claim to it"
    acquire(lock)
    lock.check()
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_lost_its_lock_is_told_and_does_not_touch_the_other_one(lock: RunLock, tmp_path: Path) -> None:
    assert lock.try_acquire() is None
    (tmp_path / FILE_NAME).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"run\.lock, the lock of this run, was removed\. Stopped without saving"):
        lock.check()
    path = write(tmp_path, ELSEWHERE)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=f"was taken over by {NAME}"):
        lock.check()
    moved = (tmp_path / "moved").stat().st_mtime_ns
    end = time.monotonic() + 5
    while (tmp_path / "moved").stat().st_mtime_ns == moved:
        assert time.monotonic() < end, "no heartbeat"
        time.sleep(0.01)
    assert path.stat().st_mtime == 1
    lock.release()
    assert owner_of(tmp_path) == ELSEWHERE


def test_a_full_disk_leaves_no_lock(lock: RunLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_lock.os, "write", full)
        with pytest.raises(UserError, match=r"run\.lock cannot be written: No space left on device"):
            lock.try_acquire()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run\.lock cannot be written: File exists"):
        Quick(tmp_path / "file").try_acquire()


# Over ranks


def hold(folder: Path) -> tuple[list[str], bool]:
    said: list[str] = []
    with locked(folder, said.append, Quick) as check:
        check()
        held = (folder / FILE_NAME).exists()
        dist.barrier()
        return said, held


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught, locked(folder, print, Quick):
        pass
    return str(caught.value)


def test_ranks_lock_together_and_rank_0_says_what_it_waits_for(ranks, tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE)
    (said, held), *others = ranks.run(hold, tmp_path, size=3)
    assert held
    assert len(said) == 2
    assert others == [([], True)] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_the_same_on_every_rank(ranks, tmp_path: Path) -> None:
    path = write(tmp_path, ELSEWHERE)
    with heartbeat(path):
        messages = ranks.run(refused, tmp_path, size=3)
    assert len(set(messages)) == 1
    assert "process 4242 of ada on node17" in messages[0]

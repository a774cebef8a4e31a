"""Kills and signals: a run that is resumed afterwards computes what an undisturbed one does, to the bit."""

import os
import signal
import time

from tests.e2e.jobs import Job
from tests.faults.faults import OVERRIDES, Kind, Trial, expect, expect_same_run, finish


def _kill_a_rank(trial: Trial) -> None:
    """Kill -9 one rank, or the launcher, at a random time of the run."""
    folder = trial.shared.copy(trial.folder)
    job = Job(folder, *OVERRIDES)
    job.wait_for_step(1)
    ranks = job.ranks()
    time.sleep(trial.random.uniform(0, 1.5))
    victim = trial.random.choice([*ranks, job.process.pid])
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        victim = 0  # it was done
    status, _, stderr = job.wait()
    expect(status == 0 or status == 1 or victim == job.process.pid, f"the killed run ended with {status}: {stderr}")
    finish(folder)
    expect_same_run(folder / "out", trial.shared.whole)


def _kill_in_a_write(trial: Trial) -> None:
    """Kill -9 a rank at its nth change to the disk: a file that is opened for writing, synced, renamed or removed."""
    folder = trial.shared.copy(trial.folder)
    change, rank = trial.random.randint(1, 120), trial.random.randint(0, 1)
    job = Job(
        folder, *OVERRIDES, entry="killed_in_a_write", environment={"KILL_AT": str(change), "KILL_RANK": str(rank)}
    )
    status, _, stderr = job.wait()
    expect(status in (0, 1), f"the killed run ended with {status}: {stderr}")
    finish(folder)
    expect_same_run(folder / "out", trial.shared.whole)


def _signal(trial: Trial) -> None:
    """SIGTERM or SIGINT to a rank or the launcher: it saves, says so by its status, and is resumed."""
    folder = trial.shared.copy(trial.folder)
    job = Job(folder, *OVERRIDES)
    job.wait_for_step(1)
    ranks = job.ranks()
    time.sleep(trial.random.uniform(0, 0.3))
    number = trial.random.choice([signal.SIGTERM, signal.SIGINT])
    victim = trial.random.choice([*ranks, job.process.pid])
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        number = signal.Signals.SIGTERM  # it was done
    status, _, stderr = job.wait()
    expect(status in (0, 128 + number), f"the stopped run ended with {status}: {stderr}")
    finish(folder)
    expect_same_run(folder / "out", trial.shared.whole)


KINDS = (
    Kind("kill", "kill -9 of a rank or the launcher; the resumed run is bitwise equal", 40, _kill_a_rank),
    Kind(
        "kill-in-write",
        "kill -9 of a rank at a change to the disk; the resumed run is bitwise equal",
        40,
        _kill_in_a_write,
    ),
    Kind("signal", "SIGTERM or SIGINT; status 143 or 130, and the resumed run is bitwise equal", 20, _signal),
)

"""Kills and signals: a run that is resumed afterwards computes what an undisturbed one does, to the bit."""

import os
import signal
import time

from tests.e2e.jobs import Job
from tests.faults.faults import OVERRIDES, Kind, Trial, expect, expect_resumes


def _send_to_a_run(trial: Trial, numbers: list[signal.Signals], latest: float) -> tuple[Job, int, signal.Signals]:
    """Start the trial's run, and send a rank or the launcher one of the signals within `latest` seconds after a step.

    Return the job, the process that got it (0: the job was done), and the signal.
    """
    job = Job(trial.shared.copy(trial.folder), *OVERRIDES)
    job.wait_for_step(1)
    ranks = job.ranks()
    time.sleep(trial.random.uniform(0, latest))
    number = trial.random.choice(numbers)
    victim = trial.random.choice([*ranks, job.process.pid])
    try:
        os.kill(victim, number)
    except ProcessLookupError:
        return job, 0, number
    return job, victim, number


def _kill_a_rank(trial: Trial) -> None:
    """Kill -9 one rank, or the launcher, at a random time of the run."""
    job, victim, _ = _send_to_a_run(trial, [signal.SIGKILL], 1.5)
    status, _, stderr = job.wait()
    expect(status in (0, 1) or victim == job.process.pid, f"the killed run ended with {status}: {stderr}")
    expect_resumes(trial)


def _kill_in_a_write(trial: Trial) -> None:
    """Kill -9 a rank at its nth change to the disk: a file that is opened for writing, synced, renamed or removed."""
    folder = trial.shared.copy(trial.folder)
    change, rank = trial.random.randint(1, 120), trial.random.randint(0, 1)
    job = Job(
        folder, *OVERRIDES, entry="killed_in_a_write", environment={"KILL_AT": str(change), "KILL_RANK": str(rank)}
    )
    status, _, stderr = job.wait()
    expect(status in (0, 1), f"the killed run ended with {status}: {stderr}")
    expect_resumes(trial)


def _signal(trial: Trial) -> None:
    """SIGTERM or SIGINT to a rank or the launcher: it saves, exits with the status for it, and is resumed."""
    job, _, number = _send_to_a_run(trial, [signal.SIGTERM, signal.SIGINT], 0.3)
    status, _, stderr = job.wait()
    expect(status in (0, 128 + number), f"the stopped run ended with {status}: {stderr}")
    expect_resumes(trial)


KINDS = (
    Kind("kill", "SIGKILL of a rank or the launcher; the resumed run is bitwise equal", 40, _kill_a_rank),
    Kind(
        "kill-in-write",
        "SIGKILL of a rank at a change to the disk; the resumed run is bitwise equal",
        40,
        _kill_in_a_write,
    ),
    Kind("signal", "SIGTERM or SIGINT; status 143 or 130, and the resumed run is bitwise equal", 20, _signal),
)

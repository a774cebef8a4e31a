"""Jobs of `longctx launch` on a Slurm: srun's tasks are one run's ranks, and a job that is stopped continues."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.slurm import Slurm, needs_slurm, running_slurm
from tests.e2e.two_hosts import STEPS, wait_until
from tests.train.runs import checkpoints, losses, metrics

pytestmark = [pytest.mark.slow, needs_slurm]

PROFILE = """
[here]
executor = "slurm"
nodes = 2
ranks = 1
program = "./program"
"""
HELD = 5
"""Step in which a held job waits for a signal."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with running_slurm() as slurm:
        yield slurm


def launch(slurm: Slurm, workplace: Path, *overrides: str, module: str = "longctx") -> int:
    """Launch the job, whose ranks run `module`; return its id."""
    (workplace / "clusters.toml").write_text(PROFILE)
    (workplace / "program").write_text(f'#!/bin/sh\nSIGNALLED_STEP={HELD} exec {sys.executable} -m {module} "$@"\n')
    (workplace / "program").chmod(0o755)
    command = ["launch", "tiny.toml", "--profile", "here", "--out", "out", *STEPS, "parallel.timeout=120s", *overrides]
    slurm.run(sys.executable, "-m", "longctx", *command, cwd=workplace)
    return int(identity(workplace).partition(",")[0])


def identity(workplace: Path) -> str:
    """What Slurm calls the launched job, or its jobs."""
    return str(json.loads((workplace / "out" / "job" / "job.json").read_text())["identity"])


def launch_held(slurm: Slurm, workplace: Path, *overrides: str) -> int:
    """Launch the job and wait until it waits in its step for a signal."""
    job = launch(slurm, workplace, *overrides, module="tests.e2e.held")
    path = workplace / "out" / "metrics.jsonl"
    wait_until(
        lambda: path.exists() and f'"step": {HELD - 1},' in path.read_text(),
        100,
        lambda: f"{slurm.show(job)}: {slurm.log(job)}{said(workplace)}",
    )
    return job


def said(workplace: Path, rank: int | str = "*") -> str:
    """What the ranks, or one of them, printed."""
    return "\n".join(path.read_text() for path in sorted(workplace.glob(f"out/logs/rank-{rank}.log")))


def expect_completed(shown: dict[str, str], workplace: Path, whole: Path, resumed: list[int]) -> None:
    """Fail unless a job has completed the run that nothing interrupted."""
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), said(workplace)
    assert [run.step for run in metrics(workplace / "out").runs] == resumed
    assert losses(workplace / "out") == losses(whole)


def test_two_tasks_are_two_ranks_of_one_run(slurm: Slurm, workplace: Path, whole: Path) -> None:
    job = launch(slurm, workplace)
    shown = slurm.wait(job, "COMPLETED", "FAILED")
    expect_completed(shown, workplace, whole, [0])
    assert f"Slurm step {job}.0: 2 ranks, 1 on this node; rank 0 at node0:" in said(workplace, 0)
    assert shown["Restarts"] == "0"


def test_a_preempted_job_saves_and_continues(slurm: Slurm, workplace: Path, whole: Path) -> None:
    job = launch_held(slurm, workplace)
    urgent = workplace / "urgent.sbatch"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    slurm.wait(slurm.submit(urgent, "--partition=high", "--nodes=2", "--output=/dev/null"), "COMPLETED")
    expect_completed(slurm.wait(job, "COMPLETED", "FAILED", restarts=1), workplace, whole, [0, HELD])


def launch_importing(slurm: Slurm, workplace: Path) -> int:
    """Launch the job and wait until both ranks import torch, where they wait for the file `go`."""
    job = launch(slurm, workplace, module="tests.e2e.held_import")
    files = [workplace / f"importing-{rank}" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() for file in files), 60, lambda: f"{slurm.log(job)}{said(workplace)}")
    return job


def test_a_job_that_is_stopped_while_its_ranks_import_is_queued_again(
    slurm: Slurm, workplace: Path, whole: Path
) -> None:
    job = launch_importing(slurm, workplace)
    slurm.run("scancel", "--signal=TERM", str(job))
    (workplace / "go").touch()
    expect_completed(slurm.wait(job, "COMPLETED", "FAILED", restarts=1), workplace, whole, [0])


def test_a_job_one_of_whose_ranks_fails_at_its_start_is_not_queued_again(slurm: Slurm, workplace: Path) -> None:
    """srun sends SIGTERM to the other rank, and reports 143, as if the job had been stopped."""
    job = launch_importing(slurm, workplace)
    (workplace / "fail").touch()
    (workplace / "go").touch()
    shown = slurm.wait(job, "COMPLETED", "FAILED")
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0")
    assert not (workplace / "out" / "stopped").exists()


def test_a_job_at_its_time_limit_saves_before_it_and_continues(slurm: Slurm, workplace: Path, whole: Path) -> None:
    job = launch_held(slurm, workplace, "cluster.time=600s", "cluster.stop_before=30s")
    slurm.shorten(job, 45)
    shown = slurm.wait(job, "PENDING", "RUNNING", "FAILED", "TIMEOUT", restarts=1, timeout=120)
    assert shown["Restarts"] == "1", slurm.log(job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    expect_completed(slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT"), workplace, whole, [0, HELD])
    assert "DUE TO TIME LIMIT" not in slurm.log(job)


def test_a_cancelled_job_saves_has_not_completed_and_is_not_queued_again(slurm: Slurm, workplace: Path) -> None:
    job = launch_held(slurm, workplace)
    slurm.run(sys.executable, "-m", "longctx", "launch", "cancel", "out", cwd=workplace)
    shown = slurm.wait(job, "COMPLETED", "FAILED")
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", f"{128 + signal.SIGTERM}:0")
    assert shown["Restarts"] == "0"
    assert checkpoints(workplace / "out")[-1] == f"step-{HELD:08d}"


def test_a_killed_rank_ends_its_job_and_is_named(slurm: Slurm, workplace: Path) -> None:
    job = launch_held(slurm, workplace)
    slurm.tasks(job)[1].kill()
    killed = time.monotonic()
    shown = slurm.wait(job, "COMPLETED", "FAILED")
    assert time.monotonic() - killed < 20
    assert (shown["JobState"], shown["Restarts"]) == ("FAILED", "0")
    assert "srun: error: node1: task 1: Killed" in slurm.log(job).splitlines()[-4:]
    assert "Traceback" not in said(workplace, 0)


CURRICULUM = 'stage=[{ name = "one", train = { steps = 7 } }, { name = "two", train = { steps = 5 } }]'


def test_a_curriculum_is_a_job_per_stage_and_each_waits_for_the_one_before(slurm: Slurm, workplace: Path) -> None:
    """The first one is stopped, and queued again before the second one starts."""
    first = launch_held(slurm, workplace, CURRICULUM)
    second = int(identity(workplace).partition(",")[2])
    assert slurm.show(second)["Reason"] == "Dependency"
    slurm.run("scancel", "--signal=TERM", str(first))
    shown = [slurm.wait(first, "COMPLETED", "FAILED", restarts=1), slurm.wait(second, "COMPLETED", "FAILED")]
    assert [(job["JobName"], job["JobState"]) for job in shown] == [
        ("tiny-one", "COMPLETED"),
        ("tiny-two", "COMPLETED"),
    ], said(workplace)
    found = metrics(workplace / "out")
    assert [(run.stage, run.step) for run in found.runs] == [("one", 0), ("one", HELD), ("two", 7)]
    assert [step.step for step in found.steps] == list(range(1, 13))

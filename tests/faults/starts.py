"""Starts that must not train: a second one into a run's directory, and machines that were started differently."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.jobs import ROOT, Job
from tests.faults.faults import OVERRIDES, Kind, Trial, TrialError, expect, expect_plain, expect_same_run

DIFFERENCES = (
    "optimizer.lr=1e-4",
    "model.dim=32",
    "seed=4",
    "train.steps=13",
    "model.depth=4",
    "train.clip=0.5",
    "schedule.warmup=3",
    "checkpoint.every=4",
    "data.sequence_length=32",
    "optimizer.betas=[0.8, 0.9]",
)


def _second_start(trial: Trial) -> None:
    """Start the same command once more beside a run; that one is not disturbed."""
    folder = trial.shared.copy(trial.folder)
    job = Job(folder, *OVERRIDES, entry="held_steps")
    job.wait_for_step(1)
    (folder / "hold").touch()
    owner = job.ranks()[0]
    status, _, stderr = Job(folder, *OVERRIDES).wait()
    (folder / "hold").unlink()
    expect_plain(status, stderr)
    expect(f"is being trained into by process {owner} of " in stderr, stderr)
    status, _, stderr = job.wait()
    expect(status == 0, f"the run beside which another was started ended with {status}: {stderr}")
    expect_same_run(folder / "out", trial.shared.whole)


def ranks_of_a_cluster(
    folder: Path, overrides: list[tuple[str, ...]], prefixes: list[list[str]] | None = None, **environment: str
) -> list[subprocess.Popen[str]]:
    """Start a rank per entry of `overrides`, with the variables that torchrun or a cluster sets."""
    if not environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = os.environ | environment
    common |= {"WORLD_SIZE": str(len(overrides)), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [
                *(prefixes[rank] if prefixes else []),
                sys.executable,
                "-m",
                "longctx",
                "train",
                "tiny.toml",
                *own,
                "--out",
                "out",
            ],
            cwd=folder,
            env=common | {"RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(overrides)
    ]


def _different_machines(trial: Trial) -> None:
    """Start one of two ranks with another recipe; each ends and names the difference."""
    folder = trial.shared.copy(trial.folder)
    difference = trial.random.choice(DIFFERENCES)
    own = [OVERRIDES, OVERRIDES]
    odd = trial.random.randint(0, 1)
    own[odd] = (*OVERRIDES, difference)
    ranks = ranks_of_a_cluster(folder, own)
    try:
        said = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, stderr in zip(ranks, said, strict=True):
        expect_plain(rank.returncode, stderr)
        key = re.escape(difference.partition("=")[0])
        if not re.search(rf"{key}[^:]*: .+ on rank 0, .+ on rank 1", stderr):
            raise TrialError(f"{difference} on rank {odd} is not named: {stderr}")


KINDS = (
    Kind(
        "second-start",
        "a second start beside a run; it is refused with the owner's name, the run continues",
        20,
        _second_start,
    ),
    Kind("different-nodes", "a node with another recipe; both end and name the difference", 10, _different_machines),
)

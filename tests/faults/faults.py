"""Faults of a campaign: what is tried in a trial, and when a trial survives."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.e2e.jobs import Job
from tests.train.runs import losses, tensors, write_workplace

STEPS = 12
OVERRIDES = (
    f"train.steps={STEPS}",
    "parallel.timeout=120s",
    "train.sequences_per_step=1",
    "checkpoint.every=3",
    "checkpoint.keep=2",
)


class TrialError(AssertionError):
    """A trial that the run did not survive as it should."""


@dataclass(frozen=True)
class Trial:
    """One trial of a kind of fault."""

    folder: Path
    """Empty, of its own."""
    random: random.Random
    shared: "Workplace"


@dataclass(frozen=True)
class Kind:
    """A kind of fault: `run` raises TrialError, or another AssertionError, if a trial is not survived."""

    name: str
    """As on the command line."""
    what: str
    """What the table says is tried, and what survival is."""
    trials: int
    run: Callable[[Trial], None]
    needs_root: bool = False

    def is_possible(self) -> bool:
        """Whether this process may do it."""
        tools = all(shutil.which(tool) for tool in ("ip", "tc", "mount"))
        return not self.needs_root or (os.geteuid() == 0 and tools)


class Workplace:
    """A corpus, a recipe and the run that nothing disturbed, on 2 ranks; made once."""

    def __init__(self, folder: Path, train: Callable[[Path, Sequence[str]], None]) -> None:
        """`train`: trains `tiny.toml` of a folder into its `whole`, with overrides."""
        self.folder = write_workplace(folder)
        self.whole = self.folder / "whole"
        train(self.folder, [*OVERRIDES, "checkpoint.keep=4"])

    def copy(self, folder: Path, *, run: bool = False, steps: int = STEPS) -> Path:
        """Copy it, with what the undisturbed run had in `out` after so many steps if `run`; return the folder."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("whole"), dirs_exist_ok=True)
        if run:
            shutil.copytree(self.whole, folder / "out")
            for checkpoint in (folder / "out" / "checkpoints").iterdir():
                if int(checkpoint.name.removeprefix("step-")) > steps:
                    shutil.rmtree(checkpoint)
        return folder


def train_as_user(folder: Path, overrides: Sequence[str]) -> None:
    """Train by the command line: see Workplace."""
    status, _, stderr = Job(folder, *overrides).wait()
    expect(status == 0, f"the undisturbed run ended with {status}: {stderr}")
    (folder / "out").rename(folder / "whole")


def expect(condition: object, message: str) -> None:
    """Raise TrialError with the message unless the condition holds."""
    if not condition:
        raise TrialError(message)


def expect_plain(status: int, stderr: str) -> None:
    """Raise TrialError unless a command ended with a plain error."""
    expect(status == 2 and "error: " in stderr, f"status {status}: {stderr[-2000:]}")
    expect("Traceback" not in stderr, stderr[-2000:])


def expect_same_run(run: Path, whole: Path) -> None:
    """Raise TrialError unless two runs have the same losses and end with the same tensors, to the bit."""
    expect(losses(run) == losses(whole), f"losses {losses(run)} instead of {losses(whole)}")
    name = f"step-{STEPS:08d}"
    one, other = (tensors(each / "checkpoints" / name) for each in (run, whole))
    different = [key for key in other if key not in one or not torch.equal(one[key], other[key])]
    expect(one.keys() == other.keys() and not different, f"tensors differ: {different}")


def expect_resumes(trial: Trial) -> None:
    """Resume the trial's run to its end; raise TrialError unless it is the undisturbed one then, to the bit."""
    status, _, stderr = Job(trial.folder, *OVERRIDES).wait()
    expect(status == 0, f"the resumed run ended with {status}: {stderr[-2000:]}")
    expect_same_run(trial.folder / "out", trial.shared.whole)


def run(*command: object) -> None:
    """Run a command of the system; raise if it fails."""
    subprocess.run([str(part) for part in command], check=True, capture_output=True)

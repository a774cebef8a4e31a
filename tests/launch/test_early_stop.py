"""SIGTERM while `longctx train` starts: which processes note it, and how their runs end."""

import os
import signal
import subprocess
import sys

import pytest

from longctx.launch import early_stop
from longctx.launch.early_stop import hold_early_stop, note_early_stop

RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def called(monkeypatch):
    """What is done with the signal."""
    calls = []
    for name in ("hold_stop", "note_stop", "release_stop"):
        monkeypatch.setattr(early_stop, name, lambda name=name: calls.append(name))
    return calls


@pytest.mark.parametrize(
    ("variables", "arguments", "calls"),
    [
        (STEP, ["train", "a.toml"], ["hold_stop", "note_stop"]),
        ({}, ["train", "a.toml"], ["hold_stop", "note_stop"]),
        (RANK, ["train", "a.toml", "--nproc", "2"], ["hold_stop", "note_stop"]),
        (RANK, ["train", "a.toml"], ["hold_stop", "release_stop"]),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "x"}, ["train", "a.toml"], ["hold_stop", "release_stop"]),
        (STEP, ["train", "a.toml", "--check"], []),
        (STEP, ["doctor"], []),
        (STEP, [], []),
    ],
    ids=["srun", "launcher", "launcher in a job", "torchrun", "wrong environment", "check", "doctor", "nothing"],
)
def test_who_notes_it(monkeypatch, called, variables, arguments, calls):
    for name in (*RANK, *STEP):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hold_early_stop(arguments)
    note_early_stop(arguments)
    assert called == calls


def test_a_launcher_that_is_stopped_before_it_starts_ranks_says_that_the_run_can_go_on(tmp_path):
    """The signal comes when the recipe is read: long before, the process would have died of it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def watch(event, details):\n"
        "    if event == 'open' and str(details[0]).endswith('tiny.toml'):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.addaudithook(watch)\n"
    )
    (tmp_path / "tiny.toml").write_text('extends = "quickstart"\nname = "tiny"\n')
    command = [sys.executable, "-m", "longctx", "train", "tiny.toml", "--nproc", "2", "--out", "out"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.splitlines()[-1].startswith("stopped by SIGTERM. --resume auto continues")
    assert (tmp_path / "out" / "stopped").read_text() == "before it could save\n"

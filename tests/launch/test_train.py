"""`longctx train`: it starts ranks with the resolved recipe, or is one of a job's."""

import json
import os
import socket
import sys
import types

import pytest

from longctx.launch import train as training
from longctx.parallel.rank_errors import RankError
from longctx.recipe import Recipe, load
from tests.launch.test_main import run

DESCRIBED = "RANK and WORLD_SIZE: 1 rank; rank 0 at a:1\n"
RECIPE = """
name = "tiny"
[model]
layers = "L"
depth = 2
dim = 16
lightning.heads = 2
[data]
path = "corpus"
sequence_length = 64
[train]
steps = 4
device = "cpu"
[evaluation]
every = 2
[checkpoint]
every = 2
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return "tiny.toml"


@pytest.fixture
def started(monkeypatch):
    """The jobs that would have been started, each with the status 7."""
    jobs = []

    def run_ranks(entry, arguments, **options):
        jobs.append((entry, json.loads(json.dumps(arguments)), options))
        return 7

    monkeypatch.setattr(training, "run_ranks", run_ranks)
    return jobs


def test_train_starts_ranks_with_the_whole_recipe(recipe, started, tmp_path, monkeypatch):
    assert run("train", recipe, "train.steps=5", "parallel.cp=2", "--nproc", "2", "--out", "here")[0] == 7
    ((entry, arguments, options),) = started
    assert options["ranks"] == 2
    assert str(options["logs"]) == "here/logs"

    called = []
    trainer = types.ModuleType("longctx.train.trainer")
    trainer.train = lambda recipe, out, **others: called.append((recipe, str(out), others)) or 143
    monkeypatch.setitem(sys.modules, "longctx.train.trainer", trainer)
    assert entry == "longctx.launch.train:run_rank"
    assert training.run_rank(**arguments) == 143
    others = {"resume": "auto", "command": sys.orig_argv, "only_stage": None}
    assert called == [(load(recipe, ["train.steps=5", "parallel.cp=2"]), "here", others)]


def test_a_tracker_that_is_not_installed_is_an_error_before_ranks_start(recipe, started, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, text = run("train", recipe, "logging.wandb.project=p")
    assert status == 2
    assert "pip install -e '.[wandb]'" in " ".join(text.split())
    assert started == []


def test_train_names_the_run_after_the_recipe(recipe, started):
    run("train", recipe)
    ((_, arguments, options),) = started
    assert (arguments["out"], options["ranks"], options["node"]) == ("runs/tiny", 1, None)
    assert options["title"] == "tiny, in runs/tiny"


def test_on_a_cpu_the_recipes_axes_say_how_many_ranks(recipe, started, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    run("train", recipe, "parallel.cp=4")
    assert started[0][2]["ranks"] == 4
    status, stderr = run("train", recipe, "parallel.cp=8")
    assert (status, len(started)) == (2, 1)
    assert "[parallel] need 8 ranks, and this machine has 4 CPU cores and no GPU" in stderr
    run("train", recipe, "parallel.cp=8", "--nproc", "8")
    assert started[1][2]["ranks"] == 8


def test_a_node_of_a_job_starts_its_own_ranks(recipe, started, monkeypatch):
    job = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "head", "PET_MASTER_PORT": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    run("train", recipe, "parallel.cp=4", "--nproc", "2")
    assert (started[0][2]["ranks"], started[0][2]["node"].node) == (2, 1)
    assert "does not divide the number of ranks, 6" in run("train", recipe, "parallel.cp=4", "--nproc", "3")[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train.stps=3"], "command line: train.stps: unknown key; did you mean 'steps'?"),
        (["parallel.cp=2", "parallel.ulysses=3"], "parallel.ulysses: cp = 2 is not a multiple of ulysses = 3"),
        (["parallel.cp=2", "--nproc", "3"], "start a multiple of 2 (--nproc 2 on one machine)"),
        (["--nproc", "2"], "train.sequences_per_step: 1 is not a multiple of the data-parallel size 2"),
        (["--resume", "gone"], "--resume gone: there is no such directory"),
    ],
)
def test_what_cannot_run_is_refused_before_any_rank_starts(recipe, started, arguments, text):
    status, stderr = run("train", recipe, *arguments)
    assert (status, started) == (2, [])
    assert text in stderr


def test_a_run_directory_that_cannot_be_made_is_named(recipe, tmp_path):
    (tmp_path / "file").touch()
    assert run("train", recipe, "--out", "file") == (
        2,
        "error: file/logs: cannot be created: Not a directory; choose another --out\n",
    )


def test_inside_a_job_this_process_is_the_rank(recipe, started, monkeypatch):
    called = []
    trainer = types.ModuleType("longctx.train.trainer")
    trainer.train = lambda recipe, out, resume, **_: called.append((recipe, str(out), resume)) or 143
    monkeypatch.setitem(sys.modules, "longctx.train.trainer", trainer)
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert run("train", recipe, "parallel.cp=2", "--resume", "never")[0] == 143
    ((found, out, resume),) = called
    assert isinstance(found, Recipe)
    assert (out, resume, started) == ("runs/tiny", "never", [])

    status, stderr = run("train", recipe, "--nproc", "2")
    assert status == 2
    assert "already one rank of 2" in stderr
    assert "parallel: dp_replicate * cp = 1 * 4" in run("train", recipe, "parallel.cp=4")[1]
    monkeypatch.delenv("MASTER_ADDR")
    assert "MASTER_ADDR is not" in run("train", recipe)[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "many", "WORLD_SIZE 'many': expected a number"),
        ("RANK", "-1", "RANK '-1': expected a number"),
        ("RANK", "2", "RANK 2: expected less than WORLD_SIZE, 2; each rank needs its own"),
        ("MASTER_PORT", "", "MASTER_PORT '': expected a number"),
        ("MASTER_PORT", "99999", "MASTER_PORT 99999: expected at most 65535"),
    ],
)
def test_a_jobs_environment_is_checked_before_the_rendezvous(recipe, started, monkeypatch, name, value, message):
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for each, text in (job | {name: value}).items():
        monkeypatch.setenv(each, text)
    status, stderr = run("train", recipe)
    assert status == 2
    assert stderr.startswith(f"error: {message}")
    assert started == []


def test_an_error_inside_a_job_is_left_for_torchrun(recipe, tmp_path, monkeypatch):
    def fail(recipe, out, resume, only_stage):
        raise KeyError("the cause")

    trainer = types.ModuleType("longctx.train.trainer")
    trainer.train = fail
    monkeypatch.setitem(sys.modules, "longctx.train.trainer", trainer)
    names = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in (names | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}).items():
        monkeypatch.setenv(name, value)
    status, stderr = run("train", recipe)
    assert status == 1
    assert "the cause" in (tmp_path / "error.json").read_text()
    first, *_, last = stderr.removeprefix(DESCRIBED).splitlines()
    assert (first, stderr.count("  File ")) == ("Traceback (most recent call last):", 1), "no frame of the command line"
    assert last == (
        f"error: rank 0 on {socket.gethostname()} failed with the error above. --resume auto continues from the last "
        "complete checkpoint."
    )


def test_a_rank_that_lost_another_says_that_and_no_more(recipe, tmp_path, monkeypatch):
    def fail(recipe, out, resume, only_stage):
        raise RankError("step 3: rank 0 lost contact with another rank")

    trainer = types.ModuleType("longctx.train.trainer")
    trainer.train = fail
    monkeypatch.setitem(sys.modules, "longctx.train.trainer", trainer)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    status, stderr = run("train", recipe)
    assert (status, stderr) == (1, f"{DESCRIBED}error: step 3: rank 0 lost contact with another rank\n")


def test_one_stage_and_the_tiny_variant(recipe, started, tmp_path):
    (tmp_path / recipe).write_text(
        RECIPE + '[[stage]]\nname = "a"\n[[stage]]\nname = "b"\ntrain.steps = 9\n[tiny.model]\ndim = 8\n'
    )
    assert run("train", recipe, "--tiny", "--stage", "b", "--nproc", "1")[0] == 7
    ((_, arguments, options),) = started
    assert arguments["only_stage"] == "b"
    assert arguments["recipe"]["model"]["dim"] == 8
    assert options["title"] == "tiny-tiny, in runs/tiny-tiny"
    status, stderr = run("train", recipe, "--stage", "c")
    assert (status, stderr) == (2, "error: --stage c: the recipe has the stages a, b\n")

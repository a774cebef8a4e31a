"""Threads and malloc of a rank's process, and the second start of ranks that a scheduler started without."""

import os

import pytest

from longctx.launch import rank_settings as settings
from longctx.launch.rank_settings import exec_with_settings, rank_settings, threads_per_rank

RANK = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1"}


@pytest.fixture
def started_again(monkeypatch):
    """The environments of the programs that took this one's place."""
    environments = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(settings.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "execve", lambda file, arguments, environment: environments.append(environment))
    for name in (*RANK, *rank_settings(1), "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    return environments


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_ranks_share_the_physical_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(settings.psutil, "cpu_count", lambda logical: 8)
    assert [threads_per_rank(ranks) for ranks in (1, 2, 4, 7)] == [6, 3, 1, 1]
    monkeypatch.setattr(settings.psutil, "cpu_count", lambda logical: 4)
    assert threads_per_rank(2) == 2  # two hyperthreads on a core are one core


def test_a_rank_without_settings_starts_again_with_them_once(started_again, monkeypatch):
    set_all(monkeypatch, RANK | {"MALLOC_MMAP_MAX_": "7"})
    exec_with_settings(["train", "quickstart"])
    (environment,) = started_again
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["MALLOC_MMAP_MAX_"] == "7", "what is set takes precedence"
    set_all(monkeypatch, {name: environment[name] for name in rank_settings(1)})
    exec_with_settings(["train", "quickstart"])
    assert len(started_again) == 1


def test_slurms_cores_per_task_are_the_threads(started_again, monkeypatch):
    set_all(monkeypatch, RANK | {"SLURM_CPUS_PER_TASK": "5"})
    exec_with_settings(["train", "quickstart"])
    assert started_again[0]["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [({}, []), (RANK, ["--nproc", "2"]), (RANK, ["--nproc=2"]), (RANK | {"RANK": "9"}, [])],
    ids=["no job", "its ranks are to be started", "the same", "a wrong environment, which the command reports"],
)
def test_other_processes_go_on_as_they_are(started_again, monkeypatch, variables, arguments):
    set_all(monkeypatch, variables)
    exec_with_settings(["train", "quickstart", *arguments])
    assert started_again == []

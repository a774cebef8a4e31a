"""A job that has trained and saved ends with status 0, each time (docs/checkpoints.md says what could end it else)."""

import os
import subprocess
import sys

import pytest

from longctx.launch.local import run_ranks
from tests.e2e.jobs import ROOT, Job
from tests.train.runs import checkpoints, write_workplace


def test_a_rank_does_not_wait_for_its_interpreter_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_ranks("tests.e2e.leaving:abort_at_the_end", {}, ranks=2, logs=tmp_path) == 0
    assert (tmp_path / "rank-1.log").read_text() == "the last words"


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["train", "no-such-recipe"], 2)])
def test_nor_does_one_that_torchrun_or_a_cluster_has_started(arguments, status):
    code = "from longctx.launch.main import main; from tests.e2e.leaving import abort_at_the_end as end; end(); main()"
    rank = {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    job = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | rank, capture_output=True, text=True
    )
    assert job.returncode == status
    assert job.stdout.startswith("the last words")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("entry", "jobs"), [(None, 50), ("lazy_switching", 30)])
def test_every_job_exits_cleanly(tmp_path, entry, jobs):
    write_workplace(tmp_path)
    failed = {}
    for number in range(jobs):
        arguments = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=2", "logging.tensorboard=true")
        status, _, stderr = Job(tmp_path, *arguments, entry=entry).wait()
        said = stderr + (tmp_path / "out" / "logs" / "rank-1.log").read_text()
        if status != 0 or "terminate called" in said:
            failed[number] = said
        else:
            assert checkpoints(tmp_path / "out") == ["step-00000003", "step-00000004"]
        (tmp_path / "out").rename(tmp_path / f"out-{number}")
    assert not failed, f"{len(failed)} of {jobs} jobs did not exit cleanly"

"""`longctx train` end to end: exit statuses, messages, and that a run resumes however it was ended."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longctx.engines.metrics import FILE_NAME, read_metrics
from longctx.launch.main import app
from tests.combinations import mostly_slow
from tests.e2e.jobs import ROOT, Job
from tests.train.runs import RECIPE, checkpoints, interrupted_copy, losses, metrics, train, write_workplace

STEPS = ("train.steps=12", "train.sequences_per_step=1", "checkpoint.every=3", "checkpoint.keep=2")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


def newest(out: Path) -> int:
    return max(int(name.removeprefix("step-")) for name in checkpoints(out) if not name.endswith(".partial"))


@pytest.mark.parametrize("how", mostly_slow(["killed long ago", "stopped", "stopped and killed"], "killed long ago"))
def test_a_run_that_was_stopped_and_killed_computes_what_an_uninterrupted_one_does(ranks, workplace, monkeypatch, how):
    """By default one job is started, which continues what kill -9 would have left after step 6."""
    out, whole = workplace / "out", workplace / "whole"
    shutil.rmtree(out, ignore_errors=True)
    ranks.run(train, workplace, whole, [*STEPS, "checkpoint.keep=4"], size=2)
    if how == "killed long ago":
        interrupted_copy(whole, out, 6)
        resumed = [0, 6]
    else:
        resumed = [0, stop_in_step_5(workplace, monkeypatch)]
    if how == "stopped and killed":
        resumed.append(kill_in_step_8(workplace, monkeypatch))

    # The same command continues to the end.
    status, stdout, stderr = Job(workplace, *STEPS).wait()
    assert (status, stderr) == (0, "Starting 2 ranks on this machine: tiny, in out\n")
    assert f"Resumed from out/checkpoints/step-{resumed[-1]:08d} after step {resumed[-1]}." in stdout
    assert checkpoints(out) == ["step-00000009", "step-00000012"]
    assert [run.step for run in metrics(out).runs] == resumed
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["loss.png"]
    assert losses(out) == losses(whole)


@pytest.mark.slow
def test_a_second_start_beside_a_run_is_refused_and_the_run_continues(tmp_path, monkeypatch):
    write_workplace(tmp_path)
    monkeypatch.setenv("SIGNALLED_STEP", "5")
    job = Job(tmp_path, *STEPS, "parallel.timeout=200s", entry="signalled_in_a_step")
    job.wait_for_step(4)
    before = (tmp_path / "out" / FILE_NAME).read_bytes()
    status, stdout, stderr = Job(tmp_path, *STEPS).wait()
    assert (status, stdout) == (2, "")
    owner = job.ranks()[0]
    assert f"\nerror: out is being trained into by process {owner} of " in stderr, (
        "after the line that says what starts"
    )
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == before
    os.kill(job.ranks()[1], signal.SIGTERM)  # what rank 1 waits for
    assert job.wait()[0] == 128 + signal.SIGTERM
    assert newest(tmp_path / "out") == 5
    assert not (tmp_path / "out" / "run.lock").exists()


def stop_in_step_5(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """SIGTERM: saved at the end of the step; returns its number."""
    out = workplace / "out"
    monkeypatch.setenv("SIGNALLED_STEP", "5")
    job = Job(workplace, *STEPS, entry="signalled_in_a_step")
    job.wait_for_step(4)
    job.process.send_signal(signal.SIGTERM)
    status, _, stderr = job.wait()
    assert status == 128 + signal.SIGTERM
    assert "SIGTERM: saving and stopping" in stderr
    assert "Traceback" not in stderr
    stopped = job.metrics().steps[-1].step
    assert stopped == 5
    assert newest(out) == stopped
    return stopped


def kill_in_step_8(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """kill -9 of one rank: the other stops, and what was complete stays so; returns the step of that."""
    out = workplace / "out"
    stopped = newest(out)
    monkeypatch.setenv("SIGNALLED_STEP", "8")
    job = Job(workplace, *STEPS, entry="signalled_in_a_step")
    job.wait_for_step(7)
    job.wait_until(lambda: newest(out) == 6)
    killed = time.monotonic()
    os.kill(job.ranks()[1], signal.SIGKILL)
    status, _, stderr = job.wait()
    assert status == 1
    assert time.monotonic() - killed < 20
    assert stderr.count("error: ") == 1
    assert "rank 1 was killed by SIGKILL" in stderr
    assert "--resume auto continues from the last complete checkpoint" in stderr
    assert "Traceback" not in stderr
    saved = newest(out)
    assert stopped < saved <= job.metrics().steps[-1].step < 12
    return saved


@pytest.mark.slow
def test_a_checkpoint_that_is_being_written_when_a_rank_is_killed_is_not_there(ranks, tmp_path):
    write_workplace(tmp_path)
    partial = tmp_path / "out" / "checkpoints" / "step-00000004.partial"
    job = Job(tmp_path, "train.steps=6", "checkpoint.every=2", entry="slow_writing")
    job.wait_until(lambda: (partial / "__0_0.distcp").exists() and (partial / "__1_0.distcp").exists())
    os.kill(job.ranks()[0], signal.SIGKILL)
    status, _, stderr = job.wait()
    assert status == 1
    assert "rank 0 was killed by SIGKILL" in stderr
    assert checkpoints(tmp_path / "out") == ["step-00000002", "step-00000004.partial"]
    ranks.run(train, tmp_path, tmp_path / "out", ["train.steps=6", "checkpoint.every=2"], size=2)
    assert [run.step for run in job.metrics().runs] == [0, 2]
    assert checkpoints(tmp_path / "out") == [f"step-{step:08d}" for step in (2, 4, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_rank_of_a_job_saves_and_is_its_status(tmp_path, monkeypatch, number):
    """As a scheduler takes it, which would call a job with status 0 completed."""
    write_workplace(tmp_path)
    rank = {"PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    out, arguments = tmp_path / "out", ("train.steps=4000", "parallel.cp=1", "checkpoint.every=4000", "--out", "out")
    command = [sys.executable, "-m", "longctx", "train", "tiny.toml", *arguments]
    job = subprocess.Popen(command, cwd=tmp_path, env=os.environ | rank, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not ((out / FILE_NAME).exists() and read_metrics(out / FILE_NAME).steps):
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(number)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    (saved,) = checkpoints(out)
    assert 0 < int(saved.removeprefix("step-")) < 4000


@pytest.mark.slow
def test_a_mistake_that_the_ranks_find_is_said_once(ranks, workplace):
    ranks.run(train, workplace, workplace / "three" / "out", ["train.steps=3"], size=2)
    (workplace / "three" / "tiny.toml").write_text((workplace / "tiny.toml").read_text())
    (workplace / "three" / "corpus").symlink_to(workplace / "corpus")
    status, stdout, stderr = Job(workplace / "three", "model.dim=32").wait()
    assert (status, stdout) == (2, "")
    assert stderr.startswith(
        "error: checkpoint out/checkpoints/step-00000003 is of another model: dim: 16, expected 32"
    )
    assert len(stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.dimm=32"], "model.dimm"),
        (["parallel.ulysses=3"], "parallel.ulysses: cp = 2 is not a multiple of ulysses = 3"),
        (["model.lightning.heads=3"], "lightning.heads: 3 heads do not divide dim 16"),
        (["--resume", "out/checkpoints/step-00000009"], "--resume out/checkpoints/step-00000009: there is no such dir"),
    ],
)
def test_a_mistake_in_the_recipe_is_said_before_any_rank_starts(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    result = CliRunner().invoke(app, ["train", "tiny.toml", "--nproc", "2", "--out", "out", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_it_continues(ranks, tmp_path):
    """The ranks that it starts again must not meet those before them, whose addresses are in the same store."""
    write_workplace(tmp_path)
    ranks.run(train, tmp_path, tmp_path / "whole", [*STEPS, "checkpoint.keep=4"], size=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "tests.e2e.killed_once"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        [*command, "train", "tiny.toml", *STEPS, "--out", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert job.returncode == 0, job.stderr
    assert "Resumed from out/checkpoints/step-00000006 after step 6." in job.stdout
    assert re.search(r"Recovered [\d.]+s after the last step before; [12] steps? (is|are) repeated\.", job.stdout)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")

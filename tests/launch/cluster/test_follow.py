"""`longctx launch status`, `logs` and `cancel`: which job a name means, and what is said of it."""

import json
from pathlib import Path

import pytest

from longctx.launch.cluster.job import Record
from tests.launch.test_main import run

SLURM = '[gpu]\nexecutor = "slurm"\nranks = 2\n'


@pytest.fixture
def launched(workplace, profiles, tools) -> Path:
    """The run directory of a job that was launched."""
    profiles(SLURM)
    tools.add("sbatch", "12")
    assert run("launch", "quickstart", "--profile", "gpu")[0] == 0
    return workplace / "runs/quickstart"


def test_a_job_is_followed_by_its_name_or_directory(launched, tools):
    tools.add("scontrol", "JobId=12 JobState=RUNNING RunTime=00:01:00 TimeLimit=UNLIMITED")
    running = "Slurm job 12: running, for 00:01:00 of UNLIMITED\nruns/quickstart: "
    assert run("launch", "status", "quickstart") == (0, f"{running}no metrics here yet\n")
    step = {"step": 7, "loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 12345.6}
    (launched / "metrics.jsonl").write_text(f"{json.dumps(step)}\n")
    (launched / "recipe.toml").write_text("[train]\nsteps = 400\n")
    said = f"{running}step 7 of 400, loss 2.5000, 12,346 tokens/s\n"
    assert run("launch", "status", "runs/quickstart")[1] == said


def test_a_job_is_cancelled_and_not_queued_again(launched, tools):
    tools.add("scancel")
    tools.add("squeue", "RUNNING")
    assert run("launch", "cancel", "quickstart")[0] == 0
    assert (launched / "job/cancelled").exists()
    assert tools.calls()[-1] == "scancel --signal=TERM 12"


def test_the_runs_of_a_sweep_are_each_followed(workplace, profiles, tools):
    profiles(SLURM)
    tools.add("sbatch", "12")
    tools.add("scontrol", "JobId=12 JobState=PENDING")
    tools.add("scancel")
    tools.add("squeue", "PENDING")
    assert run("launch", "quickstart", "--sweep", "optimizer.lr=1e-3,3e-4", "--profile", "gpu")[0] == 0
    said = run("launch", "status", "quickstart")[1].splitlines()
    assert said[1:] == [f"runs/quickstart/{number}: no metrics here yet" for number in (0, 1)]
    run("launch", "cancel", "quickstart")
    assert all((workplace / f"runs/quickstart/{number}/job/cancelled").exists() for number in (0, 1))


def test_an_examination_has_a_table_and_no_steps(workplace, profiles, tools):
    profiles(SLURM)
    tools.add("sbatch", "12")
    tools.add("scontrol", "JobId=12 JobState=COMPLETED")
    assert run("launch", "doctor", "--profile", "gpu")[0] == 0
    table = "runs/doctor: its table is in runs/doctor/logs/rank-0.log when it has ended\n"
    assert run("launch", "status", "doctor") == (0, f"Slurm job 12: completed\n{table}")


def test_the_log_of_a_rank_is_printed(launched, tools, capfd):
    tools.add("scontrol", "JobId=12 JobState=RUNNING RunTime=00:01:00 TimeLimit=UNLIMITED")
    status, stderr = run("launch", "logs", "quickstart", "--rank", "1")
    assert status == 2
    assert "runs/quickstart/logs/rank-1.log: there is no such log (there are: none). Slurm job 12: running" in stderr
    (launched / "logs/rank-1.log").write_text("step 1\n")
    assert run("launch", "logs", "quickstart", "--rank", "1")[0] == 0
    assert capfd.readouterr().out == "step 1\n"


def test_a_job_is_found_in_the_directory_of_its_profile(workplace, tmp_path, profiles, tools):
    place = tmp_path / "shared"
    place.mkdir()
    profiles(f'{SLURM}directory = "{place}"\n')
    tools.add("sbatch", "12")
    tools.add("scontrol", "JobId=12 JobState=COMPLETED")
    assert run("launch", "quickstart", "--profile", "gpu")[0] == 0
    status, stderr = run("launch", "status", "quickstart")
    assert status == 2
    assert stderr.endswith(
        "there is no runs/quickstart/job/job.json; --profile NAME looks in the directory of a profile too\n"
    )
    assert run("launch", "status", "quickstart", "--profile", "gpu")[0] == 0
    status, stderr = run("launch", "status", "other", "--profile", "gpu")
    assert f"there is no runs/other/job/job.json or {place}/runs/other/job/job.json\n" in stderr


def test_a_record_of_before_is_read(launched):
    content = json.loads((launched / "job/job.json").read_text())
    del content["is_examination"]
    assert Record(**content).identity == "12"

"""`longctx launch`: what it prints, writes, submits, and says of a job afterwards."""

import json

import pytest

from longctx.launch.cluster import submit
from longctx.recipe import load
from tests.launch.cluster import golden_jobs
from tests.launch.test_main import run

SLURM = '[gpu]\nexecutor = "slurm"\nranks = 2\n'


@pytest.mark.parametrize("profile", golden_jobs.SUFFIXES)
@pytest.mark.parametrize("recipe", golden_jobs.RECIPES)
def test_every_recipe_is_printed_for_every_executor(profile, recipe):
    written = golden_jobs.golden_file(profile, recipe).read_text()
    assert golden_jobs.printed(profile, recipe) == written, (
        "python -m tests.launch.cluster.golden_jobs writes them anew"
    )


def test_a_dry_run_writes_nothing_and_says_what_would_be(workplace, profiles, tools):
    profiles(SLURM)
    status, stderr = run("launch", "quickstart", "--profile", "gpu", "--dry-run")
    job = workplace / "runs/quickstart/job"
    assert status == 0
    assert stderr == f"# also written: {job}/recipe.toml\n# submitted by: sbatch --parsable {job}/job.sbatch\n"
    assert (tools.calls(), [path.name for path in workplace.iterdir()]) == ([], ["clusters.toml"])


def test_a_job_is_submitted_with_the_resolved_recipe_and_found_by_its_name(workplace, profiles, tools):
    profiles(SLURM)
    tools.add("sbatch", "12")
    status, stderr = run("launch", "quickstart", "train.steps=500", "cluster.partition=long", "--profile", "gpu")
    assert status == 0, stderr
    assert "Submitting quickstart, 2 ranks on 1 nodes" not in stderr
    assert "Submitting quickstart, 2 ranks on 1 node: " in stderr
    assert "longctx launch status runs/quickstart\n" in stderr
    folder = workplace / "runs/quickstart/job"
    assert load(folder / "recipe.toml").train.steps == 500
    assert "#SBATCH --partition=long\n" in (folder / "job.sbatch").read_text()

    tools.add("scontrol", "JobId=12 JobState=RUNNING RunTime=00:01:00 TimeLimit=UNLIMITED")
    running = "Slurm job 12: running, for 00:01:00 of UNLIMITED\nruns/quickstart: "
    assert run("launch", "status", "quickstart") == (0, f"{running}no metrics here yet\n")
    step = {"step": 7, "loss": 2.5, "grad_norm": 1.0, "tokens_per_second": 12345.6}
    (workplace / "runs/quickstart/metrics.jsonl").write_text(f"{json.dumps(step)}\n")
    assert run("launch", "status", "runs/quickstart")[1] == f"{running}step 7, loss 2.5000, 12,346 tokens/s\n"

    tools.add("scancel")
    tools.add("squeue", "RUNNING")
    assert run("launch", "cancel", "quickstart")[0] == 0
    assert (folder / "cancelled").exists()
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


def test_the_nodes_of_a_profile_are_examined_by_a_job(workplace, profiles, tools):
    profiles(SLURM)
    tools.add("sbatch", "12")
    status, stderr = run("launch", "doctor", "cluster.nodes=2", "--profile", "gpu")
    assert status == 0, stderr
    script = (workplace / "runs/doctor/job/job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n" in script
    assert script.count('longctx doctor --out "$run" --json "$run"/hardware.json\n') == 1
    assert "an examination has no recipe" in run("launch", "doctor", "train.steps=3", "--profile", "gpu")[1]
    assert "the executor local is this machine: longctx doctor examines it" in run("launch", "doctor")[1]


def test_the_log_of_a_rank_is_printed(workplace, profiles, tools, capfd):
    profiles(SLURM)
    tools.add("sbatch", "12")
    run("launch", "quickstart", "--profile", "gpu")
    logs = workplace / "runs/quickstart/logs"
    status, stderr = run("launch", "logs", "quickstart", "--rank", "1")
    assert status == 2
    assert "runs/quickstart/logs/rank-1.log: there is no such log yet (there are: none)" in stderr
    (logs / "rank-1.log").write_text("step 1\n")
    assert run("launch", "logs", "quickstart", "--rank", "1")[0] == 0
    assert capfd.readouterr().out == "step 1\n"


def test_local_runs_it_here(workplace, monkeypatch):
    calls = []
    monkeypatch.setattr(submit, "train", lambda *given, **options: calls.append((given, options)) or 3)
    assert run("launch", "quickstart", "train.steps=500", "cluster.ranks=2")[0] == 3
    ((given, options),) = calls
    assert given == ("quickstart", ["train.steps=500"])
    assert (options["nproc"], str(options["out"])) == (2, "runs/quickstart")
    printed = "longctx train quickstart train.steps=500 --out runs/quickstart --nproc 2\n"
    assert run("launch", "quickstart", "train.steps=500", "cluster.ranks=2", "--dry-run") == (0, printed)


def test_local_takes_as_many_ranks_as_longctx_train(workplace, monkeypatch):
    """Which depends on the machine: the profile has no number of its own."""
    calls = []
    monkeypatch.setattr(submit, "train", lambda *given, **options: calls.append(options) or 0)
    assert run("launch", "quickstart") == (0, "")
    assert calls[0]["nproc"] is None
    assert run("launch", "quickstart", "--dry-run")[1] == "longctx train quickstart --out runs/quickstart\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch", "quickstart", "--profile", "gpu", "train.stpes=3"], "train.stpes: unknown key; did you mean"),
        (["launch", "quickstart", "--profile", "gpu", "cluster.nodse=3"], "command line: nodse: unknown key; did you"),
        (["launch", "quickstart", "--profile", "gpu"], "sbatch: there is no such command here"),
        (
            ["launch", "quickstart", "--sweep", "optimizer.lr=1,2", "cluster.ranks=2"],
            "the executor local runs",
        ),
        (["launch", "status", "nothing"], "nothing: no job was launched from here under this name"),
    ],
)
def test_what_cannot_be_is_said(workplace, profiles, tools, arguments, said):
    profiles(SLURM)
    status, stderr = run(*arguments)
    assert status == 2
    assert said in stderr

"""`longctx launch`: what it prints, writes, submits, and says of a job afterwards."""

import pytest

from longctx.launch.cluster import submit
from longctx.launch.cluster.executors import EXECUTORS
from longctx.launch.cluster.job import plan_job
from longctx.launch.cluster.profile import load_profile
from longctx.recipe import load
from longctx.recipe.sources import shipped_folder
from tests.launch.cluster import golden_jobs
from tests.launch.test_main import run

SLURM = '[gpu]\nexecutor = "slurm"\nranks = 2\n'


@pytest.mark.parametrize("profile", golden_jobs.SUFFIXES)
@pytest.mark.parametrize("recipe", golden_jobs.RECIPES)
def test_jobs_are_printed_as_they_were_when_they_were_read(profile, recipe):
    written = golden_jobs.golden_file(profile, recipe).read_text()
    assert golden_jobs.printed(profile, recipe) == written, (
        "python -m tests.launch.cluster.golden_jobs writes them anew"
    )


OTHERS = sorted({path.stem for path in shipped_folder().glob("*.toml")} - {*golden_jobs.RECIPES})


@pytest.mark.parametrize("recipe", OTHERS)
def test_every_other_recipe_is_a_job_of_every_executor_on_the_ranks_that_it_is_laid_out_for(recipe):
    ranks, overrides = load(recipe).fewest_ranks, []
    if ranks < 16:  # one for CPUs, on two nodes
        ranks, overrides = 16, golden_jobs.OVERRIDES
    for name in golden_jobs.SUFFIXES:
        hosts = ", ".join(f'"me@node{number}"' for number in range(ranks // 8))
        nodes = f"hosts=[{hosts}]" if name == "ssh" else f"nodes={ranks // 8}"
        profile = load_profile(name, golden_jobs.PROFILES, [nodes])
        job = plan_job(recipe, overrides, [], profile, None)
        submission = EXECUTORS[profile.executor].of_profile(profile).prepare(job)
        assert job.nodes * job.ranks == ranks
        assert submission.files[submission.script]
        assert len(submission.then) == (max(len(job.stages) - 1, 0) if profile.executor == "slurm" else 0)


def test_a_dry_run_writes_nothing_and_says_what_would_be(workplace, profiles, tools):
    profiles(SLURM)
    status, stderr = run("launch", "quickstart", "--profile", "gpu", "--dry-run")
    job = workplace / "runs/quickstart/job"
    assert status == 0
    assert stderr == f"# also written: {job}/recipe.toml\n# submitted by: sbatch --parsable {job}/job.sbatch\n"
    assert (tools.calls(), [path.name for path in workplace.iterdir()]) == ([], ["clusters.toml"])


def test_a_job_is_submitted_with_the_resolved_recipe(workplace, profiles, tools):
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


def test_a_job_is_not_submitted_over_one_that_has_not_ended(workplace, profiles, tools):
    """It would replace the recipe that the other is about to read, and its record."""
    profiles(SLURM)
    tools.add("sbatch", "12")
    tools.add("squeue", "PENDING")
    launch = ("launch", "quickstart", "--profile", "gpu")
    assert run(*launch)[0] == 0
    status, stderr = run(*launch, "train.steps=500")
    assert status == 2
    assert "runs/quickstart: its job 12 has not ended (longctx launch status runs/quickstart), and reads" in stderr
    assert load(workplace / "runs/quickstart/job/recipe.toml").train.steps == 400
    assert run(*launch, "train.steps=500", "--out", "runs/other")[0] == 0
    tools.add("squeue", "")
    assert run(*launch, "train.steps=500")[0] == 0


def test_a_directory_that_is_not_here_is_refused_and_one_elsewhere_is_shown_whole(workplace, tmp_path, profiles, tools):
    profiles(SLURM)
    tools.add("sbatch", "12")
    place = tmp_path / "shared"
    launch = ("launch", "quickstart", "--profile", "gpu", f"cluster.directory={place}")
    status, stderr = run(*launch)
    assert (status, place.exists()) == (2, False)
    assert f"directory: {place}: there is no such directory here; give one on a file system that" in stderr
    place.mkdir()
    assert f"longctx launch status {place}/runs/quickstart\n" in run(*launch)[1]


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
    ],
)
def test_what_cannot_be_is_said(workplace, profiles, tools, arguments, said):
    profiles(SLURM)
    status, stderr = run(*arguments)
    assert status == 2
    assert said in stderr

"""A job: its recipes, checked for the profile's ranks, and the text that scripts share."""

from pathlib import Path

import pytest

from longctx.errors import UserError
from longctx.launch.cluster.job import plan_examination, plan_job, prologue
from longctx.launch.cluster.profile import LocalProfile, SlurmProfile
from longctx.recipe import load


def slurm(**keys) -> SlurmProfile:
    return SlurmProfile(executor="slurm", **keys)


def test_a_job_has_the_recipes_name_and_directory(workplace):
    job = plan_job("quickstart", ["train.steps=500"], [], slurm(ranks=2), None)
    assert (job.name, job.out, job.directory) == ("quickstart", Path("runs/quickstart"), workplace)
    assert job.recipes == (load("quickstart", ["train.steps=500"]),)
    ((path, text),) = job.recipe_files().items()
    assert path == workplace / "runs/quickstart/job/recipe.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert load(path) == job.recipes[0]


def test_the_recipe_is_checked_for_all_ranks(workplace):
    with pytest.raises(UserError, match=r"dp_replicate \* cp = 1 \* 2 = 2 does not divide the number of ranks, 3"):
        plan_job("quickstart", [], [], slurm(nodes=3), None)


def test_a_sweep_is_a_run_for_each_combination(workplace):
    sweep = ["optimizer.lr=1e-3,3e-4", "optimizer.betas=[0.9, 0.95],[0.8, 0.9]"]
    job = plan_job("quickstart", [], sweep, slurm(ranks=2), Path("runs/s"))
    values = [(recipe.optimizer.lr, recipe.optimizer.betas) for recipe in job.recipes]
    betas = [(0.9, 0.95), (0.8, 0.9)]
    assert values == [(1e-3, betas[0]), (1e-3, betas[1]), (3e-4, betas[0]), (3e-4, betas[1])]
    assert job.runs == [Path(f"runs/s/{number}") for number in range(4)]
    assert len(job.recipe_files()) == 4


@pytest.mark.parametrize("text", ["optimizer.lr", "optimizer.lr=1e-3", "=1,2"])
def test_a_sweep_needs_a_key_and_values(workplace, text):
    with pytest.raises(UserError, match=r"--sweep .*: expected a key and several values"):
        plan_job("quickstart", [], [text], slurm(ranks=2), None)


def test_the_directory_is_absolute(workplace):
    with pytest.raises(UserError, match="directory: runs: give an absolute path"):
        plan_job("quickstart", [], [], slurm(ranks=2, directory="runs"), None)


def test_values_of_the_environment_are_quoted():
    profile = LocalProfile(executor="local", setup=("module load x",), environment={"A": "1 2"})
    failed, *lines = prologue(profile)
    assert failed.startswith("failed() { ")
    assert lines == ["module load x || failed $LINENO", "export A='1 2'", ""]
    assert prologue(LocalProfile(executor="local")) == []


def test_a_recipe_in_a_script_is_the_same_recipe(workplace):
    for name in ("quickstart", "million", "routed"):
        job = plan_job(name, ["train.sequences_per_step=2"], [], slurm(ranks=2), None)
        first, *lines, last = job.write_recipe("/tmp/recipe.toml")
        assert (first, last) == ("cat > /tmp/recipe.toml <<'RECIPE'", "RECIPE")
        (workplace / "recipe.toml").write_text("\n".join(lines))
        assert load(workplace / "recipe.toml") == job.recipes[0]


def test_an_examination_has_no_recipe(workplace):
    profile = slurm(ranks=2, program="/a b/longctx")
    job = plan_examination(profile, None)
    assert (job.name, job.runs, job.recipe_files(), job.write_recipe("x")) == ("doctor", [Path("runs/doctor")], {}, [])
    assert job.command(profile, "x", "run") == "'/a b/longctx' doctor --out run --json run/hardware.json"

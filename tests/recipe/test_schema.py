"""The recipe: names of runs, and the checks against a number of ranks."""

import pytest

from longctx.errors import UserError
from longctx.recipe import Recipe, check, load
from longctx.recipe.tables import LRScheduleConfig, ParallelConfig, TrainConfig


def test_check_lists_everything_that_does_not_fit_the_ranks():
    recipe = Recipe.model_construct(
        train=TrainConfig(steps=1),
        schedule=LRScheduleConfig(warmup=2),
        parallel=ParallelConfig(cp=4),
    )
    with pytest.raises(UserError) as caught:
        check(recipe, 2)
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == ["schedule.warmup", "parallel"]
    assert check(recipe.model_copy(update={"schedule": LRScheduleConfig()}), 4) is None


RECIPE = """
name = "{}"
[model]
layers = "L"
depth = 1
dim = 16
lightning.heads = 2
[data]
path = "corpus"
sequence_length = 64
[train]
steps = 4
[checkpoint]
every = 2
"""


@pytest.mark.parametrize("name", ["a", "0.5B", "run-2_of.4"])
def test_a_name_is_that_of_a_directory(tmp_path, name):
    (tmp_path / "r.toml").write_text(RECIPE.format(name))
    assert load(tmp_path / "r.toml").name == name


@pytest.mark.parametrize("name", ["", ".", "a/b", "a b", "x" * 101])
def test_a_name_that_no_directory_should_have_is_refused(tmp_path, name):
    (tmp_path / "r.toml").write_text(RECIPE.format(name))
    with pytest.raises(UserError, match=r"r\.toml:2: name: .* cannot name a directory"):
        load(tmp_path / "r.toml")


def test_defaults_leave_out_evaluation_and_other_engines(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format("a"))
    recipe = load(tmp_path / "r.toml")
    assert (recipe.seed, recipe.engine) == (1, "torch")
    assert recipe.evaluation is recipe.deepspeed is recipe.megatron is None

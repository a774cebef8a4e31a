"""Stages of a run: where it is by its latest checkpoint."""

from pathlib import Path

import pytest

from longctx.checkpoint.trainer_state import TrainerState
from longctx.errors import UserError
from longctx.recipe import Recipe, load
from longctx.train.stages import find_stage
from tests.train.runs import RECIPE

PATH = Path("runs/a/checkpoints/step-00000003")
STAGES = 'stage=[{ name = "a", train = { steps = 3 } }, { name = "b", train = { steps = 2 } }]'


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    (tmp_path / "r.toml").write_text(RECIPE)
    return load(tmp_path / "r.toml", [STAGES, "schedule.warmup=0"])


def state(step: int, **stages: int) -> TrainerState:
    return TrainerState(step, 0, 0, "data", {}, stages=stages)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (None, ("a", False)),
        (state(1, a=0), ("a", False)),
        (state(3, a=0), ("b", True)),
        (state(4, a=0), ("b", True)),  # the recipe had more steps then
        (state(4, a=0, b=3), ("b", False)),
        (state(5, a=0, b=3), ("b", False)),  # complete, and so is the run
    ],
)
def test_the_stage_that_comes_next(recipe, saved, expected):
    stage, begins = find_stage(recipe, PATH, saved)
    assert (stage.name, begins) == expected


def test_only_one_stage(recipe):
    assert find_stage(recipe, PATH, state(1, a=0), "a")[0].name == "a"
    assert find_stage(recipe, PATH, state(3, a=0), "b")[1]
    # A later one, since this one is complete.
    assert find_stage(recipe, PATH, state(4, a=0, b=3), "a")[0].name == "b"


@pytest.mark.parametrize(("saved", "step"), [(None, 0), (state(2, a=0), 2)])
def test_a_stage_before_another_is_complete(recipe, saved, step):
    with pytest.raises(UserError, match=rf"--stage b: stage a \(1 of 2\) comes first, and is at step {step} of 3"):
        find_stage(recipe, PATH, saved, "b")


def test_a_checkpoint_of_another_curriculum(recipe, tmp_path):
    with pytest.raises(UserError, match="is of the stage 'c', and the recipe has the stages a, b: restore"):
        find_stage(recipe, PATH, state(1, c=0))
    with pytest.raises(UserError, match="is of a run without stages, and the recipe has the stages a, b"):
        find_stage(recipe, PATH, state(1))
    with pytest.raises(UserError, match="is of the stage 'a', and the recipe has no stages"):
        find_stage(load(tmp_path / "r.toml"), PATH, state(1, a=0))

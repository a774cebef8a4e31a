"""Tiny variants: the table [tiny] over the others, or left out."""

import pytest

from longctx.errors import UserError
from longctx.recipe.sources import MergedConfig, Origin
from longctx.recipe.tiny import split_tiny


def recipe(**tables: object) -> MergedConfig:
    origins = {(): Origin("r.toml"), ("dim",): Origin("r.toml", 2), ("tiny",): Origin("r.toml", 5)}
    origins[("tiny", "dim")] = Origin("r.toml", 6)
    return MergedConfig({"name": "big", "dim": 512, **tables}, origins)


def test_without_being_asked_for_it_is_left_out():
    whole = split_tiny(recipe(tiny={"dim": 8}), tiny=False)
    assert whole.data == {"name": "big", "dim": 512}
    assert whole.origin(("dim",)) == Origin("r.toml", 2)


def test_its_keys_are_over_the_recipes_with_their_lines():
    tiny = split_tiny(recipe(tiny={"dim": 8}), tiny=True)
    assert tiny.data == {"name": "big-tiny", "dim": 8}
    assert tiny.origin(("dim",)) == Origin("r.toml", 6)


def test_it_may_have_a_name_of_its_own():
    assert split_tiny(recipe(tiny={"name": "small"}), tiny=True).data["name"] == "small"


def test_stages_are_merged_by_name():
    stages = [{"name": "a", "steps": 1000, "length": 4096}, {"name": "b", "steps": 10}]
    small = [{"name": "b", "steps": 2}, {"name": "a", "steps": 3}]
    tiny = split_tiny(recipe(stage=stages, tiny={"stage": small}), tiny=True)
    assert tiny.data["stage"] == [{"name": "a", "steps": 3, "length": 4096}, {"name": "b", "steps": 2}]


@pytest.mark.parametrize("stages", [{}, {"stage": [{"name": "a"}]}])
def test_a_stage_that_the_recipe_has_not_is_refused(stages):
    # It would be trained after the others: what remains when a stage is taken out of the recipe and not out of [tiny].
    with pytest.raises(UserError, match=r"^r\.toml:5: tiny\.stage: the recipe has no stage 'b'; remove it there too$"):
        split_tiny(recipe(**stages, tiny={"stage": [{"name": "b", "steps": 2}]}), tiny=True)


@pytest.mark.parametrize("tables", [{}, {"tiny": 3}])
def test_a_recipe_without_one_says_so(tables):
    with pytest.raises(UserError, match=r"^r\.toml: --tiny: the recipe has no table \[tiny\]$"):
        split_tiny(recipe(**tables), tiny=True)

"""docs/model-recipes.md: its tables are those of the recipes, and engines take or refuse them as it says."""

import re
from collections import Counter
from pathlib import Path

import pytest

from longctx.errors import UserError
from longctx.launch.recipes import lengths, parameters
from longctx.mixers import MIXERS
from longctx.recipe import load
from longctx.recipe.schema import check
from longctx.train.display import human_count
from tests.recipes.estimates import CLUSTER, training_flops

PAGE = (Path(__file__).parents[2] / "docs" / "model-recipes.md").read_text(encoding="utf-8")


def rows(title: str) -> dict[str, list[str]]:
    """The rows of the table under a title, by recipe, without the recipe."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    return {name.strip("`"): rest for name, *rest in cells}


def test_every_recipe_is_in_both_tables():
    assert sorted(rows("The recipes")) == sorted(rows("Engines")) == CLUSTER


@pytest.mark.parametrize("name", CLUSTER)
def test_the_numbers_are_those_of_the_recipe(name):
    recipe = load(name)
    mixers = Counter(MIXERS[letter].name for letter in recipe.model.pattern)
    expected = [
        human_count(parameters(recipe)),
        ", ".join(f"{count} {mixer}" for mixer, count in mixers.most_common()),
        lengths(recipe),
        str(recipe.fewest_ranks),
        f"{training_flops(recipe):.1e}",
    ]
    assert rows("The recipes")[name][:5] == expected


@pytest.mark.parametrize("engine", ["deepspeed", "megatron"])
@pytest.mark.parametrize("name", CLUSTER)
def test_engines_take_the_recipes_or_refuse_them_by_name(name, engine):
    said = rows("Engines")[name][engine == "megatron"]
    named = re.findall(r"`(.*?)`", said)
    if said.startswith("refuses "):
        with pytest.raises(UserError) as refused:
            load(name, [f"engine={engine}", "train.ffn_tile=none"])
        lines = [line for line in str(refused.value).splitlines() if not line.endswith("mistakes in the recipe:")]
        assert [re.search(r": ([a-z_.]+): ", line)[1] for line in lines] == named
        assert all(f"engine = {engine!r}" in line for line in lines)
        return
    assert said == "yes" or said.startswith("with ")
    recipe = load(name, [f"engine={engine}", *named])
    check(recipe, recipe.fewest_ranks)
    if named:
        with pytest.raises(UserError, match=named[0].partition("=")[0]):
            load(name, [f"engine={engine}"])

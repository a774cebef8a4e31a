"""The shipped recipes: each is valid on its ranks, as a whole and tiny, and its head says what it takes."""

import pytest

from longctx.errors import UserError
from longctx.recipe import load
from longctx.recipe.schema import check
from longctx.recipe.sources import shipped_folder
from tests.recipes import estimates
from tests.recipes.estimates import CLUSTER

GPU_BYTES = 80e9
ROOM = 0.7
"""Share of a GPU's memory for states and block inputs; the rest is for one block at a time, buffers and the logits."""


@pytest.mark.parametrize("name", CLUSTER)
def test_a_recipe_is_valid_on_its_ranks(name):
    recipe = load(name)
    assert recipe.name == name
    check(recipe, recipe.fewest_ranks)
    with pytest.raises(UserError):
        check(recipe, recipe.fewest_ranks + 1)


@pytest.mark.parametrize("name", CLUSTER)
def test_its_tiny_variant_has_the_same_structure_and_runs_on_two_ranks(name):
    whole, tiny = load(name), load(name, tiny=True)
    assert tiny.fewest_ranks == 2
    check(tiny, 2)
    assert tiny.name == f"{name}-tiny"
    assert [stage.name for stage in tiny.stages] == [stage.name for stage in whole.stages]
    assert tiny.stages[-1].recipe.data.sequence_length == 4096
    assert tiny.stages[-1].recipe.parallel.cp == 2
    for key in ("layers", "ffn", "block", "residual", "norm", "tie_embeddings"):
        assert getattr(tiny.model, key) == getattr(whole.model, key), key
    assert set(tiny.model.pattern) == set(whole.model.pattern)
    assert tiny.model.dim == 64
    assert (tiny.model.mixture is None) == (whole.model.mixture is None)
    assert (tiny.model.heads is None) == (whole.model.heads is None)
    if tiny.model.mixture is not None:
        assert tiny.parallel.ep == 2
    if whole.model.heads is not None:
        small, large = (heads_in_use(recipe) for recipe in (tiny, whole))
        assert small == large
    for stage in tiny.stages:
        assert stage.recipe.train.device == "cpu"
        assert stage.recipe.data.corpora == "data/stdlib"
        assert stage.recipe.train.steps <= 8


def heads_in_use(recipe):
    """The share of the heads that a token uses."""
    return (recipe.model.heads.shared + recipe.model.heads.active) / recipe.model.softmax.heads


@pytest.mark.parametrize("name", CLUSTER)
def test_stages_grow_the_context_by_steps_of_about_as_many_tokens(name):
    stages = [stage.recipe for stage in load(name).stages]
    lengths = [stage.data.sequence_length for stage in stages]
    assert lengths == sorted(set(lengths))
    assert len({stage.tokens_per_step for stage in stages}) == 1
    for stage in stages:
        assert stage.train.precision == "bf16"
        assert stage.train.activation_checkpointing == "block"
        assert stage.train.ffn_tile == 8192
        assert stage.evaluation is not None


@pytest.mark.parametrize("name", [name for name in CLUSTER if set("SA") & set(load(name).model.pattern)])
def test_softmax_positions_grow_with_the_context(name):
    tables = [stage.recipe.model.softmax or stage.recipe.model.attention_experts for stage in load(name).stages]
    scalings = [getattr(table, "rope_scaling", None) for table in tables]
    factors = [1.0 if scaling is None else scaling.factor for scaling in scalings]
    bases = [table.rope_theta * factor for table, factor in zip(tables, factors, strict=True)]
    assert bases == sorted(set(bases))


@pytest.mark.parametrize("name", CLUSTER)
def test_states_and_block_inputs_fit_its_gpus(name):
    recipe = load(name)
    assert estimates.state_bytes(recipe) + estimates.block_input_bytes(recipe) < ROOM * GPU_BYTES


@pytest.mark.parametrize("name", CLUSTER)
def test_the_head_says_what_the_recipe_takes(name):
    head = (shipped_folder() / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    recipe = load(name)
    assert estimates.memory_line(recipe) in head, "python -m tests.recipes.estimates writes it anew"
    assert estimates.flops_line(recipe) in head
    layout = next(line for line in head if line.startswith("# Layout:"))
    assert layout.startswith(f"# Layout: {recipe.fewest_ranks} GPUs of 80 GB")
    assert any(line.startswith(f"#   longctx train {name} --tiny ") for line in head)

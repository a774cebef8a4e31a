"""Stages of a recipe: what a stage may set, and overrides of one or of all."""

import pytest

from longctx.recipe import Recipe
from longctx.recipe.sources import COMMAND_LINE, MergedConfig, Origin
from longctx.recipe.stages import check_stages, override_recipe, split_stages, stage_tables, with_required

FILE = Origin("r.toml", 1)


def merged(**tables: object) -> MergedConfig:
    return MergedConfig(dict(tables), {(): Origin("r.toml")})


def two_stages() -> MergedConfig:
    """Stages of 1 and 2 steps, the second with a schedule of its own."""
    first = {"name": "a", "train": {"steps": 1}}
    second = {"name": "b", "train": {"steps": 2}, "schedule": {"kind": "constant"}}
    return merged(train={"clip": 1.0}, schedule={"kind": "wsd", "decay": 3}, stage=[first, second])


def test_tables_of_a_stage_are_merged_over_the_recipes():
    source = two_stages()
    assert [stage.data for stage in split_stages(source)] == [
        {"train": {"clip": 1.0, "steps": 1}, "schedule": {"kind": "wsd", "decay": 3}},
        {"train": {"clip": 1.0, "steps": 2}, "schedule": {"kind": "constant"}},
    ]


def test_rope_scaling_is_set_as_a_whole():
    recipe = {"model": {"softmax": {"heads": 2, "rope_scaling": {"kind": "yarn", "factor": 4.0}}}}
    stage = {"name": "a", "model": {"softmax": {"rope_scaling": {"kind": "linear"}}}}
    assert stage_tables(recipe, stage) == {"model": {"softmax": {"heads": 2, "rope_scaling": {"kind": "linear"}}}}


def test_what_a_stage_leaves_out_is_the_recipes():
    stage = {"name": "a", "reset_optimizer": False, "seed": None, "train": {}, "evaluation": {}}
    assert stage_tables({"seed": 3, "evaluation": None}, stage) == {"seed": 3, "evaluation": None}


def test_keys_of_a_stage_have_its_lines():
    source = two_stages()
    source.origins |= {("stage", 1, "train", "steps"): Origin("r.toml", 9), ("train", "clip"): Origin("r.toml", 2)}
    _, second = split_stages(source)
    assert second.origin(("train", "steps")) == Origin("r.toml", 9)
    assert second.origin(("train", "clip")) == Origin("r.toml", 2)


def test_an_override_of_a_stage_changes_that_one():
    source = two_stages()
    override_recipe(source, "stage.b.train.steps=7")
    first, second = split_stages(source)
    assert (first.data["train"]["steps"], second.data["train"]["steps"]) == (1, 7)
    assert second.origin(("train", "steps")) == COMMAND_LINE
    assert not source.mistakes


def test_an_override_of_a_key_that_stages_set_changes_it_in_all_of_them():
    source = two_stages()
    override_recipe(source, "train.steps=7")
    assert [stage.data["train"]["steps"] for stage in split_stages(source)] == [7, 7]
    assert all(stage.origin(("train", "steps")) == COMMAND_LINE for stage in split_stages(source))


def test_an_override_reaches_tables_that_a_stage_sets_as_a_whole():
    source = two_stages()
    override_recipe(source, "schedule.warmup=1")
    assert [stage.data["schedule"] for stage in split_stages(source)] == [
        {"kind": "wsd", "decay": 3, "warmup": 1},
        {"kind": "constant", "warmup": 1},
    ]


@pytest.mark.parametrize("text", ["stage.c.train.steps=7", "stage.a=7"])
def test_an_override_of_no_stage_is_a_mistake_that_names_them(text):
    source = two_stages()
    before = dict(source.data)
    override_recipe(source, text)
    (mistake,) = source.mistakes
    assert mistake.endswith("should be stage.NAME.key with a stage of a, b")
    assert source.data == before


def test_all_stages_can_be_given_at_once():
    source = two_stages()
    override_recipe(source, 'stage=[{ name = "c" }]')
    assert [stage["name"] for stage in source.data["stage"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ({"train": {"init": "x"}}, ("train", "init")),
        ({"train": {"device": "cpu"}}, ("train", "device")),
        ({"parallel": {"timeout": 3}}, ("parallel", "timeout")),
        ({"checkpoint": {"copy_to": "s3://x"}}, ("checkpoint", "copy_to")),
        ({"model": {"dim": 3}}, ("model", "dim")),
        ({"model": {"softmax": {"heads": 3}}}, ("model", "softmax", "heads")),
    ],
)
def test_keys_of_the_run_and_tensors_of_the_model_are_not_a_stages(stage, key):
    (mistake,) = check_stages([{"name": "a"}, {"name": "b", **stage}])
    assert mistake.key == ("stage", 1, *key)


def test_megatron_reads_weights_and_optimizer_states_together():
    stages = [{"name": "a"}, {"name": "b", "reset_optimizer": True}]
    (mistake,) = check_stages(stages, "megatron")
    assert mistake.key == ("stage", 1, "reset_optimizer")
    assert not check_stages(stages, "deepspeed")


def test_positions_are_a_stages():
    softmax = {"rope_theta": 1e6, "window": 3, "rope_scaling": {"kind": "yarn", "factor": 2}}
    assert not check_stages([{"name": "a", "model": {"softmax": softmax}}])


def test_two_stages_of_one_name():
    (mistake,) = check_stages([{"name": "a"}, {"name": "a"}])
    assert (mistake.key, mistake.text) == (("stage", 1, "name"), "'a' is the name of an earlier stage")


def test_a_stage_replaces_a_corpus_by_a_mix_and_a_mix_by_a_corpus():
    mix = [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]
    to_mix, to_path = {"name": "a", "data": {"mix": mix}}, {"name": "a", "data": {"path": "c"}}
    assert stage_tables({"data": {"path": "c", "mix": []}}, to_mix) == {"data": {"mix": mix}}
    assert stage_tables({"data": {"path": None, "mix": mix}}, to_path) == {"data": {"path": "c"}}


@pytest.mark.parametrize("own", [{}, {"data": {"sequence_length": 16}}])
def test_stages_may_set_the_corpora_that_the_recipe_leaves_out(own):
    mix = [{"path": "a", "weight": 1}]
    source = merged(**own, stage=[{"name": "a", "data": {"sequence_length": 32, "mix": mix}}])
    found = with_required(Recipe, source, split_stages(source)[0]).data["data"]
    assert found == {"sequence_length": own["data"]["sequence_length"] if own else 32, "mix": mix}

"""The recipe: names of runs, and the checks against a number of ranks."""

import pytest

from longctx.errors import UserError
from longctx.recipe import Recipe, check, dump, load
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


def mistakes(path, *overrides) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return [line.strip().removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


def test_tables_are_judged_together_with_the_line_of_the_key(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format("a") + "[schedule]\nwarmup = 6\n")
    assert mistakes(tmp_path / "r.toml") == ["r.toml:16: schedule.warmup: warmup takes 6 steps, but train.steps is 4"]
    assert mistakes(tmp_path / "r.toml", "schedule.warmup=7") == [
        "command line: schedule.warmup: warmup takes 7 steps, but train.steps is 4"
    ]


def test_tables_that_are_right_are_judged_together_though_another_is_wrong(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format("a") + "[schedule]\nwarmup = 6\n")
    _, *lines = mistakes(tmp_path / "r.toml", "data.sequenc_length=4")
    assert [line.split(": ")[1] for line in lines] == ["schedule.warmup", "data.sequenc_length"]


# Stages


CURRICULUM = (
    RECIPE.format("a").replace("sequence_length = 64\n", "").replace("steps = 4\n", "sequences_per_step = 2\n")
    + """
[[stage]]
name = "short"
data.sequence_length = 32
train.steps = 3
[[stage]]
name = "long"
data.sequence_length = 128
train.steps = 2
schedule.warmup = 1
reset_optimizer = true
"""
)


@pytest.fixture
def curriculum(tmp_path):
    (tmp_path / "r.toml").write_text(CURRICULUM)
    return tmp_path / "r.toml"


def test_a_stage_has_the_tables_of_the_recipe_and_its_own_over_them(curriculum):
    short, long = load(curriculum).stages
    assert (str(short), str(long)) == ("stage short (1 of 2)", "stage long (2 of 2)")
    assert [stage.recipe.data.sequence_length for stage in (short, long)] == [32, 128]
    assert [stage.recipe.train.steps for stage in (short, long)] == [3, 2]
    assert [stage.recipe.train.sequences_per_step for stage in (short, long)] == [2, 2]
    assert [stage.recipe.schedule.warmup for stage in (short, long)] == [0, 1]
    assert [stage.reset_optimizer for stage in (short, long)] == [False, True]
    assert not short.recipe.stage
    assert short.recipe.model == long.recipe.model == load(curriculum).model


def test_without_stages_the_recipe_is_the_only_one(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format("a"))
    recipe = load(tmp_path / "r.toml")
    (stage,) = recipe.stages
    assert (stage.name, stage.count, str(stage)) == (None, 1, "the run")
    assert stage.recipe is recipe is recipe.find_stage().recipe


def test_a_stage_is_found_by_its_name_and_the_last_without_one(curriculum):
    recipe = load(curriculum)
    assert recipe.find_stage("short").number == 0
    assert recipe.find_stage().name == "long"
    with pytest.raises(UserError, match="--stage shrt: the recipe has the stages short, long"):
        recipe.find_stage("shrt")


def test_a_stage_that_lacks_a_required_key_is_named(curriculum):
    curriculum.write_text(CURRICULUM.replace("data.sequence_length = 128\n", ""))
    assert mistakes(curriculum) == ["r.toml:8: data.sequence_length: missing (stage long)"]


def test_mistakes_of_all_stages_are_listed_once(curriculum):
    curriculum.write_text(CURRICULUM.replace("[checkpoint]", "[checkpoint]\nkep = 1") + "optimizer.lr = -1\n")
    _, *lines = mistakes(curriculum, "stage.short.train.steps=x")
    assert [line.split(": ", 1)[1] for line in lines] == [
        "checkpoint.kep: unknown key; did you mean 'keep'?",
        "train.steps: 'x' is not an integer; write 4096, '4_096', '4Ki' (4096) or '4k' (4000) (stage short)",
        "optimizer.lr: should be greater than 0, not -1 (stage long)",
    ]


def test_ranks_have_to_fit_every_stage(curriculum):
    recipe = load(curriculum, ["stage.short.parallel.dp_shard=2", "stage.long.parallel.cp=3"])
    assert recipe.fewest_ranks == 6
    with pytest.raises(UserError, match=r"^stage short \(1 of 2\): parallel: .*\nstage long \(2 of 2\): parallel: "):
        check(recipe, 4)
    check(load(curriculum, ["stage.short.parallel.dp_shard=2", "stage.long.parallel.cp=2"]), 2)


@pytest.mark.parametrize("defaults", [True, False])
def test_a_dumped_curriculum_loads_back_equal(curriculum, tmp_path, defaults):
    recipe = load(curriculum, ["stage.long.model.lightning={}", "stage.short.seed=4"])
    (tmp_path / "copy.toml").write_text(dump(recipe, defaults=defaults))
    assert load(tmp_path / "copy.toml").stages == recipe.stages


def test_defaults_leave_out_evaluation_and_other_engines(tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format("a"))
    recipe = load(tmp_path / "r.toml")
    assert (recipe.seed, recipe.engine) == (1, "torch")
    assert recipe.evaluation is recipe.deepspeed is recipe.megatron is None

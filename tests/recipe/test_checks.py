"""What a recipe's tables must satisfy together, and with the number of ranks."""

import pytest

from longctx.mixers.lightning import LightningConfig
from longctx.model.config import ModelConfig
from longctx.model.moe import MoeConfig
from longctx.recipe.checks import check_tables
from longctx.recipe.tables import LRScheduleConfig, ParallelConfig, TrainConfig


def found(world_size=None, *, sequences=1, schedule=None, **parallel):
    tables = {
        "train": TrainConfig(steps=10, sequences_per_step=sequences),
        "schedule": schedule or LRScheduleConfig(),
        "parallel": ParallelConfig(**parallel),
    }
    return {".".join(map(str, mistake.key)): mistake.text for mistake in check_tables(tables, world_size)}


@pytest.mark.parametrize(
    ("world_size", "parallel", "fits"),
    [
        (1, {}, True),
        (8, {"dp_replicate": 2, "dp_shard": 2, "cp": 2}, True),
        (4, {"dp_replicate": 2, "dp_shard": 2, "cp": 2}, False),
        (8, {"cp": 4}, True),
        (6, {"cp": 4}, False),
        (2, {"cp": 4}, False),
    ],
)
def test_the_axes_multiply_to_the_number_of_ranks(world_size, parallel, fits):
    assert ("parallel" in found(world_size, sequences=4, **parallel)) is not fits


def test_the_number_of_ranks_to_start_is_named():
    assert found(1, dp_shard=1, cp=2)["parallel"] == (
        "dp_replicate * dp_shard * cp = 1 * 1 * 2 = 2, but there is 1 rank; start 2 (--nproc 2 on one machine), "
        "or set dp_shard = 'rest'"
    )
    assert found(3, cp=2)["parallel"] == (
        "dp_replicate * cp = 1 * 2 = 2 does not divide the number of ranks, 3; "
        "start a multiple of 2 (--nproc 2 on one machine)"
    )


@pytest.mark.parametrize(
    ("parallel", "key"),
    [
        ({"cp": 4, "ulysses": 2, "attention": "ulysses-ring"}, None),
        ({"cp": 4, "ulysses": 3}, "parallel.ulysses"),
        ({"cp": 4, "attention": "ulysses-ring"}, "parallel.attention"),
        ({"cp": 4, "ulysses": 4, "attention": "ulysses-all-gather"}, "parallel.attention"),
        ({"cp": 4, "attention": "ulysses"}, None),
    ],
)
def test_ulysses_groups_divide_cp_and_schedules_of_two_kinds_need_both(parallel, key):
    assert list(found(4, **parallel)) == ([] if key is None else [key])


def test_a_data_parallel_size_below_one_is_refused():
    assert found(dp_shard=0) == {"parallel.dp_shard": "should be greater than 0 or 'rest', not 0"}


def test_sequences_divide_over_data_parallel_ranks():
    assert found(8, sequences=6, dp_replicate=2, cp=2)["train.sequences_per_step"] == (
        "6 is not a multiple of the data-parallel size 4 (dp_replicate * dp_shard = 2 * 2); "
        "the nearest multiples: 4 and 8"
    )
    assert found(8, sequences=8, dp_replicate=2, cp=2) == {}
    # Without the number of ranks, what `rest` will be is unknown.
    assert found(None, sequences=6, dp_replicate=2, cp=2) == {}
    assert "train.sequences_per_step" in found(None, sequences=3, dp_shard=2)


def test_warmup_and_decay_fit_into_the_steps():
    assert found(schedule=LRScheduleConfig(kind="wsd", warmup=4, decay=6)) == {}
    assert found(schedule=LRScheduleConfig(kind="wsd", warmup=5, decay=6)) == {
        "schedule.warmup": "warmup and decay take 5 + 6 = 11 steps, but train.steps is 10"
    }


def experts(world_size=None, *, count=8, hidden=6, dim=12, **parallel):
    model = ModelConfig(
        layers="L",
        depth=1,
        dim=dim,
        lightning=LightningConfig(heads=1),
        ffn="moe",
        moe=MoeConfig(experts=count, active=2, hidden=hidden),
    )
    tables = {"model": model, "parallel": ParallelConfig(**parallel)}
    return {".".join(map(str, mistake.key)): mistake.text for mistake in check_tables(tables, world_size)}


@pytest.mark.parametrize(
    ("world_size", "given", "words"),
    [
        (4, {"ep": 2, "cp": 2}, None),
        (4, {"ep": 4, "cp": 2}, None),
        (None, {"ep": 3, "cp": 2}, "8 experts (model.moe.experts) are not a multiple of ep = 3"),
        (4, {"ep": 8, "cp": 2}, "8 does not divide dp_shard * cp = 2 * 2 = 4"),
        (4, {"ep": 4, "cp": 1, "dp_replicate": 2}, "4 does not divide dp_shard * cp = 2 * 1 = 2"),
        (8, {"ep": 1, "cp": 8, "hidden": 5}, None),
        (8, {"ep": 2, "cp": 8, "hidden": 5}, "model.moe.hidden = 5 makes 10 rows, which is not a multiple of 4"),
        (10, {"ep": 2, "hidden": 5, "dim": 6}, "model.dim = 6 makes 6 rows, which is not a multiple of 5"),
        (None, {"ep": 2}, None),
    ],
)
def test_experts_divide_over_ranks(world_size, given, words):
    mistakes = experts(world_size, **given)
    assert words in mistakes.get("parallel.ep", "") if words else "parallel.ep" not in mistakes


def test_expert_parallelism_needs_experts():
    model = ModelConfig(layers="L", depth=1, dim=12, lightning=LightningConfig(heads=1))
    (mistake,) = check_tables({"model": model, "parallel": ParallelConfig(ep=2)}, None)
    assert mistake.text == "ep = 2, but no layer of the model has experts (model.ffn)"

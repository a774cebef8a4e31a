"""What a recipe's tables must satisfy together, and with the number of ranks."""

import pytest

from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.moe import MoeConfig
from longctx.recipe.checks import check_tables
from longctx.recipe.tables import CheckpointConfig, EvaluationConfig, LRScheduleConfig, ParallelConfig, TrainConfig


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


@pytest.mark.parametrize("keep_best", [None, True, False])
@pytest.mark.parametrize("evaluation", [None, EvaluationConfig(every=5)])
def test_a_best_checkpoint_that_is_asked_for_needs_an_evaluation(keep_best, evaluation):
    tables = {"checkpoint": CheckpointConfig(every=5, keep_best=keep_best), "evaluation": evaluation}
    refused = keep_best is True and evaluation is None
    mistakes = check_tables(tables, None)
    assert [mistake.key for mistake in mistakes] == ([("checkpoint", "keep_best")] if refused else [])
    del tables["evaluation"]  # invalid, which is reported by itself
    assert check_tables(tables, None) == []


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


@pytest.mark.parametrize(
    ("world_size", "parallel", "mistake"),
    [
        (4, {"cp": 4, "reproducible": 16}, None),
        (4, {"cp": 2, "reproducible": 2}, None),
        (1, {"reproducible": 12}, ("reproducible", "should be a power of two from 2 on, not 12")),
        (1, {"reproducible": 1}, ("reproducible", "should be a power of two from 2 on, not 1")),
        (3, {"cp": 3, "reproducible": 4}, ("reproducible", "cp = 3 does not divide 4")),
        (3, {"reproducible": 4}, ("reproducible", "needs a power of two of data-parallel ranks, not 3")),
        (4, {"cp": 4, "ulysses": 2, "reproducible": 4}, ("ulysses", "should be 1 with parallel.reproducible, not 2")),
        (2, {"cp": 2, "ep": 2, "reproducible": 4}, ("ep", "should be 1 with parallel.reproducible, not 2")),
    ],
)
def test_virtual_ranks_are_shared_by_powers_of_two_of_ranks(world_size, parallel, mistake):
    want = {} if mistake is None else {f"parallel.{mistake[0]}": mistake[1]}
    assert found(world_size, sequences=12, **parallel) == want


def test_heads_divide_over_virtual_ranks():
    model = ModelConfig(layers="S", depth=1, dim=32, softmax=SoftmaxConfig(heads=4, head_dim=8))
    tables = {"model": model, "parallel": ParallelConfig(attention="ulysses", reproducible=8)}
    (mistake,) = check_tables(tables, 1)
    assert mistake.text == "'ulysses' splits heads over 8 ranks, but model.softmax has 4 heads per rank"


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

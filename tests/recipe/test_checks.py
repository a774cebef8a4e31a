"""What a recipe's tables must satisfy together, and with the number of ranks."""

import pytest

from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.recipe import Recipe, check
from longctx.recipe.checks import judge
from longctx.train.config import ParallelConfig, ScheduleConfig, TrainConfig


def found(world_size=None, *, length=4096, sequences=1, schedule=None, **parallel):
    tables = {
        "data": DataConfig(path="corpus", sequence_length=length),
        "train": TrainConfig(steps=10, sequences_per_step=sequences),
        "schedule": schedule or ScheduleConfig(),
        "parallel": ParallelConfig(**parallel),
    }
    return {".".join(map(str, mistake.key)): mistake.text for mistake in judge(tables, world_size)}


@pytest.mark.parametrize(
    ("length", "cp", "layout", "fits"),
    [
        (1001, 1, "zigzag", True),  # nothing is split
        (1000, 4, "contiguous", True),
        (1004, 4, "zigzag", False),
        (1004, 4, "contiguous", True),
        (1008, 4, "zigzag", True),
        (6, 4, "contiguous", False),
    ],
)
def test_a_sequence_divides_into_the_slices_of_the_layout(length, cp, layout, fits):
    assert ("data.sequence_length" in found(length=length, cp=cp, layout=layout)) is not fits


def test_the_arithmetic_and_the_nearest_lengths_are_shown():
    assert found(length=1004, cp=4)["data.sequence_length"] == (
        "1004 tokens do not divide into 2 * cp = 8 slices (zigzag layout): 1004 = 125 * 8 + 4; "
        "nearest that fit: 1000 and 1008"
    )
    assert found(length=3, cp=4, layout="contiguous")["data.sequence_length"] == (
        "3 tokens do not divide into cp = 4 slices (contiguous layout): 3 = 0 * 4 + 3; nearest that fit: 4"
    )


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
        "or write dp_shard = 'rest'"
    )
    assert found(3, cp=2)["parallel"] == (
        "dp_replicate * cp = 1 * 2 = 2 does not divide the number of ranks, 3; "
        "start a multiple of 2 (--nproc 2 on one machine)"
    )


def test_a_data_parallel_size_below_one_is_refused():
    assert found(dp_shard=0) == {"parallel.dp_shard": "should be greater than 0 or 'rest', not 0"}


def test_sequences_divide_over_data_parallel_ranks():
    assert found(8, sequences=6, dp_replicate=2, cp=2)["train.sequences_per_step"] == (
        "6 sequences do not divide over 4 data-parallel ranks (dp_replicate * dp_shard = 2 * 2); "
        "nearest that fit: 4 and 8"
    )
    assert found(8, sequences=8, dp_replicate=2, cp=2) == {}
    # Without the number of ranks, what `rest` will be is unknown.
    assert found(None, sequences=6, dp_replicate=2, cp=2) == {}
    assert "train.sequences_per_step" in found(None, sequences=3, dp_shard=2)


def test_warmup_and_decay_fit_into_the_steps():
    assert found(schedule=ScheduleConfig(kind="wsd", warmup=4, decay=6)) == {}
    assert found(schedule=ScheduleConfig(kind="wsd", warmup=5, decay=6)) == {
        "schedule.warmup": "warmup and decay together take 5 + 6 = 11 steps and train.steps is 10"
    }


def test_check_lists_everything_that_does_not_fit_the_ranks():
    recipe = Recipe.model_construct(
        data=DataConfig(path="corpus", sequence_length=10),
        train=TrainConfig(steps=1),
        parallel=ParallelConfig(cp=4),
    )
    with pytest.raises(UserError) as caught:
        check(recipe, 2)
    assert [line.split(": ")[0] for line in str(caught.value).split("\n")] == ["data.sequence_length", "parallel"]
    assert check(recipe.model_copy(update={"data": DataConfig(path="corpus", sequence_length=16)}), 4) is None

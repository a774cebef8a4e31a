"""Recipe tables: options that exclude each other, and the size of dp_shard."""

import pytest
from pydantic import ValidationError

from longctx.recipe.tables import (
    CheckpointConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    LRScheduleConfig,
    MlflowConfig,
    OptimizerConfig,
    ParallelConfig,
    SpikeConfig,
    TrainConfig,
)


@pytest.mark.parametrize("betas", [(0.9, 1.0), (-0.1, 0.9), (1.0, 0.5)])
def test_betas_are_in_the_range_of_decay_rates(betas):
    with pytest.raises(ValidationError, match=r"betas must be in \[0, 1\)"):
        OptimizerConfig(betas=betas)
    assert OptimizerConfig(betas=(0.0, 0.999)).betas == (0.0, 0.999)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "wsd"}, "kind = 'wsd' needs decay, the number of steps of the final decay"),
        ({"kind": "cosine", "decay": 5}, "decay is an option of kind = 'wsd', not of 'cosine'"),
        ({"kind": "constant", "decay": 5}, "decay is an option of kind = 'wsd', not of 'constant'"),
        ({"kind": "constant", "final": 0.5}, "final is an option of 'cosine' and 'wsd', not of 'constant'"),
    ],
)
def test_options_of_another_lr_schedule_are_refused(options, message):
    with pytest.raises(ValidationError) as caught:
        LRScheduleConfig(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"kind": "wsd", "decay": 5, "final": 0.0}, {"final": 1.0}, {"kind": "constant", "warmup": 3}]
)
def test_options_of_the_lr_schedule_itself_are_accepted(options):
    schedule = LRScheduleConfig(**options)
    assert {name: getattr(schedule, name) for name in options} == options


@pytest.mark.parametrize("policy", ["report", "stop"])
def test_a_bound_of_skips_belongs_to_a_policy_that_skips(policy):
    assert SpikeConfig(policy="skip", max_skips=3).max_skips == 3
    with pytest.raises(ValidationError, match=f"max_skips is an option of policy = 'skip', not of '{policy}'"):
        SpikeConfig(policy=policy, max_skips=3)


def test_milestones_are_at_steps_with_a_checkpoint():
    assert CheckpointConfig(every=50, keep_every=100).keep_every == 100
    assert CheckpointConfig(every=50).keep_every == "none"
    with pytest.raises(ValidationError, match="keep_every: 120 is not a multiple of every = 50"):
        CheckpointConfig(every=50, keep_every=120)


@pytest.mark.parametrize(("offload", "least"), [("none", 0), ("optimizer", 1), ("parameters", 3)])
def test_offload_needs_a_zero_stage_that_shards_what_is_offloaded(offload, least):
    for stage in range(4):
        if stage >= least:
            assert DeepSpeedConfig(zero_stage=stage, offload=offload).zero_stage == stage
        else:
            message = f"offload: '{offload}' needs zero_stage {least} or higher, not {stage}"
            with pytest.raises(ValidationError, match=message):
                DeepSpeedConfig(zero_stage=stage, offload=offload)


@pytest.mark.parametrize(
    ("sizes", "ranks", "shard"),
    [
        ({}, 1, 1),
        ({}, 8, 8),
        ({"cp": 2, "dp_replicate": 2}, 8, 2),
        ({"cp": 2, "tp": 2, "pp": 2}, 8, 1),
        ({"cp": 3}, 8, None),
        ({"cp": 16}, 8, None),
        # ep ranks are among the others.
        ({"ep": 4, "cp": 2}, 8, 4),
        ({"dp_shard": 5, "cp": 2}, 8, 5),
    ],
)
def test_dp_shard_is_the_rest_of_the_ranks_unless_it_is_set(sizes, ranks, shard):
    assert ParallelConfig(**sizes).shard(ranks) == shard


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        (TrainConfig, "steps", 0),
        (TrainConfig, "clip", 0.0),
        (TrainConfig, "clip", "never"),
        (TrainConfig, "ffn_tile", 0),
        (TrainConfig, "precision", "fp16"),
        (TrainConfig, "init", ""),
        (OptimizerConfig, "lr", 0.0),
        (OptimizerConfig, "weight_decay", -0.1),
        (LRScheduleConfig, "final", 1.5),
        (ParallelConfig, "cp", 0),
        (ParallelConfig, "dp_shard", "all"),
        (ParallelConfig, "timeout", 0.0),
        (ParallelConfig, "timeout", 1e18),
        (EvaluationConfig, "every", 0),
    ],
)
def test_values_out_of_range_are_refused_by_their_key(table, key, value):
    required = {TrainConfig: {"steps": 1}, EvaluationConfig: {"every": 1}}.get(table, {})
    table(**required)
    with pytest.raises(ValidationError) as caught:
        table(**(required | {key: value}))
    assert {error["loc"][0] for error in caught.value.errors()} == {key}


def test_numbers_may_have_units():
    assert TrainConfig(steps="2k", ffn_tile="4Ki").model_dump(include={"steps", "ffn_tile"}) == {
        "steps": 2000,
        "ffn_tile": 4096,
    }
    assert ParallelConfig(timeout="1.5h").timeout == 5400.0
    assert ParallelConfig(timeout=30).timeout == 30.0


def test_a_password_in_the_uri_of_mlflow_is_refused_and_not_repeated():
    with pytest.raises(ValidationError) as caught:
        MlflowConfig(uri="https://me:hunter2@example.org/")
    (error,) = caught.value.errors()
    assert error["msg"].startswith("Value error, 'https://***@example.org/' names a user")
    assert "MLFLOW_TRACKING_PASSWORD" in error["msg"]
    assert MlflowConfig(uri="sqlite:///a@b.db").uri == "sqlite:///a@b.db"

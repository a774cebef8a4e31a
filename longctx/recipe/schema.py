"""The recipe: everything that decides what a run computes."""

import os
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from longctx.config import Config, Integer
from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.model.config import ModelConfig
from longctx.recipe.checks import judge
from longctx.recipe.loading import load_as
from longctx.recipe.sources import dotted
from longctx.recipe.tables import (
    CheckpointConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    LoggingConfig,
    LRScheduleConfig,
    MegatronConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Recipe(Config):
    """A complete run. Each table lives beside the code that it configures."""

    name: str
    """Names the run and, unless `--out` does, its directory: letters, digits, `.`, `_` and `-`."""
    seed: Integer = Field(default=1, ge=0)
    """Decides the initial parameters and the order of the data."""
    engine: Literal["torch", "deepspeed", "megatron"] = "torch"
    """What lays the model out over ranks and steps it. `torch`: FSDP2, built in. `deepspeed`: DeepSpeed's ZeRO, which
    divides optimizer states, gradients and parameters over all ranks, or keeps them in the CPU's memory
    (docs/deepspeed.md). `megatron`: Megatron-Core, with its linear layers, tensor and pipeline parallelism, optimizer
    and checkpoints; on GPUs (docs/megatron.md)."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: LRScheduleConfig = LRScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig | None = None
    """For `engine = "deepspeed"`, which takes the defaults where it is absent."""
    megatron: MegatronConfig | None = None
    """For `engine = "megatron"`, which takes the defaults where it is absent."""
    evaluation: EvaluationConfig | None = None
    """Without it nothing is held out."""
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_directory(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a directory; use at most 100 letters, digits, '.', '_' and '-', "
                "a letter or a digit first"
            )
        return name


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    `source` is the path of a TOML file (it ends in `.toml`) or the name of a recipe that comes with longctx. A recipe
    may say `extends = "other.toml"` (relative to its own folder) or `extends = "name"`: tables are merged, the
    extending file wins. `overrides` are `key.sub=value` with a TOML value, or a word without quotes.

    Raises UserError that lists every mistake with its file and line; what needs the number of ranks is left to
    `check`.
    """
    return load_as(Recipe, source, overrides)


def check(recipe: Recipe, world_size: int) -> None:
    """Raise UserError, listing every mistake, unless `recipe` can run on `world_size` ranks."""
    lines = [f"{dotted(mistake.key)}: {mistake.text}" for mistake in judge(dict(recipe), world_size)]
    if lines:
        raise UserError("\n".join(lines))

"""The recipe schema: everything that determines the result of a run."""

import os
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from longctx.config import Config, Integer
from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.model.config import ModelConfig
from longctx.recipe.checks import check_tables
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
    SpikeConfig,
    TrainConfig,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Recipe(Config):
    """A complete training run."""

    name: str
    """Name of the run and, without `--out`, of its directory: letters, digits, `.`, `_` and `-`."""
    seed: Integer = Field(default=1, ge=0)
    """Seed of the initial parameters and of the data order."""
    engine: Literal["torch", "deepspeed", "megatron"] = "torch"
    """Training backend. `torch`: FSDP2, built in. `deepspeed`: ZeRO stages 0 to 3, with CPU offload of optimizer states
    or parameters (docs/deepspeed.md). `megatron`: Megatron-Core's column- and row-parallel projections, tensor and
    pipeline parallelism, optimizer and checkpoints; GPUs only (docs/megatron.md)."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: LRScheduleConfig = LRScheduleConfig()
    spikes: SpikeConfig = SpikeConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig | None = None
    """Options of `engine = "deepspeed"`."""
    megatron: MegatronConfig | None = None
    """Options of `engine = "megatron"`."""
    evaluation: EvaluationConfig | None = None
    """No evaluation without this table."""
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all ranks."""
        return self.train.sequences_per_step * self.data.sequence_length

    @field_validator("name")
    @classmethod
    def _name_is_a_directory(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a directory; use at most 100 letters, digits, '.', '_' and '-', "
                "starting with a letter or a digit"
            )
        return name


def load(source: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    `source` is the path of a TOML file (ending in `.toml`) or the name of a recipe that ships with longctx. A recipe
    may set `extends = "other.toml"` (relative to its own folder) or `extends = "name"`: tables are merged, and the
    extending file wins. `overrides` are `key.sub=value` with a TOML value, or a word without quotes.

    Raises UserError that lists every mistake with its file and line. Checks that depend on the number of ranks are in
    `check`.
    """
    return load_as(Recipe, source, overrides)


def check(recipe: Recipe, world_size: int) -> None:
    """Raise UserError, listing every mistake, unless `recipe` can run on `world_size` ranks."""
    lines = [f"{dotted(mistake.key)}: {mistake.text}" for mistake in check_tables(dict(recipe), world_size)]
    if lines:
        raise UserError("\n".join(lines))

"""The recipe schema: everything that determines the result of a run."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from longctx.config import Config, Integer
from longctx.data.config import DataConfig
from longctx.errors import UserError
from longctx.model.config import ModelConfig
from longctx.recipe.checks import check_tables
from longctx.recipe.loading import parse, read_recipe, report, user_error, valid_tables
from longctx.recipe.sources import MergedConfig, dotted
from longctx.recipe.stages import (
    STAGE,
    StageConfig,
    check_stages,
    split_stages,
    stage_names,
    stage_tables,
    with_required,
)
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
    stage: tuple[StageConfig, ...] = ()
    """Stages of a curriculum; without them the run has one."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all ranks."""
        return self.train.sequences_per_step * self.data.sequence_length

    @property
    def stages(self) -> "tuple[Stage, ...]":
        """The stages of the run, in order; one, the whole recipe, if there is no `[[stage]]`."""
        if not self.stage:
            return (Stage(0, 1, None, self, reset_optimizer=False),)
        tables = self.model_dump(mode="json")
        return tuple(
            Stage(number, len(self.stage), stage.name, _resolved(tables, stage), stage.reset_optimizer)
            for number, stage in enumerate(self.stage)
        )

    def find_stage(self, name: str | None = None) -> "Stage":
        """Return the stage `name`; None: the last one. Raises UserError if there is none of that name."""
        stages = self.stages
        if name is None:
            return stages[-1]
        found = next((stage for stage in stages if stage.name == name), None)
        if found is None:
            names = ", ".join(stage.name for stage in stages if stage.name is not None)
            raise UserError(f"--stage {name}: the recipe has {f'the stages {names}' if names else 'no stages'}")
        return found

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks that has the axes of every stage."""
        return math.lcm(*(stage.recipe.parallel.fewest_ranks for stage in self.stages))

    @field_validator("name")
    @classmethod
    def _name_is_a_directory(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a directory; use at most 100 letters, digits, '.', '_' and '-', "
                "starting with a letter or a digit"
            )
        return name


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    number: int
    """From 0."""
    count: int
    """Stages of the run."""
    name: str | None
    """None if the recipe has no stages."""
    recipe: Recipe
    """What the stage trains, a recipe without stages."""
    reset_optimizer: bool
    """Whether it starts with new optimizer states."""

    def __str__(self) -> str:
        return "the run" if self.name is None else f"stage {self.name} ({self.number + 1} of {self.count})"


def _resolved(tables: Mapping[str, Any], stage: StageConfig) -> Recipe:
    return Recipe.model_validate_json(json.dumps(stage_tables(tables, stage.model_dump(mode="json"))))


def load(source: str | os.PathLike[str], overrides: Sequence[str] = (), *, tiny: bool = False) -> Recipe:
    """Read and validate a recipe.

    `source` is the path of a TOML file (ending in `.toml`) or the name of a recipe that ships with longctx. A recipe
    may set `extends = "other.toml"` (relative to its own folder) or `extends = "name"`: tables are merged, and the
    extending file wins. `tiny`: with the recipe's table `[tiny]`, a small model of the same structure. `overrides`
    are `key.sub=value` with a TOML value, or a word without quotes; `stage.NAME.key.sub=value` changes one stage.

    Raises UserError that lists every mistake with its file and line. Checks that depend on the number of ranks are in
    `check`.
    """
    merged = read_recipe(source, overrides, tiny=tiny)
    stages = split_stages(merged)
    of_stages = [_read(stage)[1] for stage in stages]
    lines = [
        line if all(line in others for others in of_stages) else f"{line} (stage {name})"
        for name, own in zip(stage_names(merged), of_stages, strict=True)
        for line in own
    ]
    recipe, others = _read_curriculum(merged, stages[0]) if stages else _read(merged)
    known = {line for own in of_stages for line in own}
    lines = list(dict.fromkeys([*lines, *(line for line in others if line not in known)]))
    if recipe is None or lines:
        raise user_error(lines, "recipe")
    return recipe


def _read(merged: MergedConfig) -> tuple[Recipe | None, list[str]]:
    """Validate a recipe without stages, or one stage; return it and a line per mistake."""
    recipe, mistakes = parse(Recipe, merged, "recipe")
    return recipe, report(merged, [*mistakes, *check_tables(valid_tables(Recipe, merged.data), None)])


def _read_curriculum(merged: MergedConfig, first: MergedConfig) -> tuple[Recipe | None, list[str]]:
    """Validate a recipe with stages, whose tables are checked apart; return it and a line per mistake.

    The recipe's own tables need not fit together: no stage may use all of them.
    """
    whole = with_required(Recipe, merged, first)
    recipe, mistakes = parse(Recipe, whole, "recipe")
    return recipe, report(whole, [*mistakes, *check_stages(merged.data[STAGE], merged.data.get("engine"))])


def check(recipe: Recipe, world_size: int) -> None:
    """Raise UserError, listing every mistake, unless `recipe` can run on `world_size` ranks."""
    lines = [
        f"{f'{stage}: ' if stage.name else ''}{dotted(mistake.key)}: {mistake.text}"
        for stage in recipe.stages
        for mistake in check_tables(dict(stage.recipe), world_size)
    ]
    if lines:
        raise UserError("\n".join(lines))

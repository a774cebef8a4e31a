"""Curriculum stages: `[[stage]]` tables of a recipe, and the recipe that each of them trains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from pydantic import BaseModel, Field

from longctx.config import Config, Integer, flattened
from longctx.model.config import position_keys
from longctx.recipe.lines import Key
from longctx.recipe.sources import (
    ALTERNATIVES,
    COMMAND_LINE,
    MergedConfig,
    Mistake,
    Override,
    apply_override,
    has_names,
    merge_tables,
    nested,
    read_override,
)

STAGE = "stage"
"""Array of tables of a recipe: the stages of its curriculum."""

_REPLACED = ("schedule", "rope_scaling")
"""Tables that a stage sets as a whole: their keys depend on their kind."""
_FIXED = (
    "train.init",
    "train.init_optimizer",
    "train.device",
    "train.deterministic",
    "parallel.timeout",
    "checkpoint.copy_to",
)
"""Keys of the run, which no stage changes."""


class StageConfig(Config):
    """`[[stage]]`: stages of a curriculum, trained in this order in one run. Each continues from the last checkpoint of
    the stage before. The tables of a stage have the keys of the recipe's tables and override them in this stage;
    `schedule` and `rope_scaling` are set as a whole. Steps, learning-rate schedule and data start anew in each stage.
    A key that every stage sets may be missing in the recipe's own tables. On the command line:
    `stage.NAME.data.sequence_length=32Ki`."""

    name: str = Field(pattern=r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
    """Name, unique in the recipe: letters, digits, `_` and `-`."""
    reset_optimizer: bool = False
    """Start the stage with new optimizer states; otherwise those of the stage before continue."""
    seed: Integer | None = Field(default=None, ge=0)
    """Seed of the data order. Default: the recipe's."""
    model: dict[str, Any] = Field(default={})
    """Keys of `[model]` by which no tensor changes: `rope_theta`, `rope_scaling` and `window` of a mixer."""
    data: dict[str, Any] = Field(default={})
    """Keys of `[data]`: other corpora, another sequence length."""
    train: dict[str, Any] = Field(default={})
    """Keys of `[train]`; `steps` are those of the stage."""
    optimizer: dict[str, Any] = Field(default={})
    """Keys of `[optimizer]`."""
    schedule: dict[str, Any] = Field(default={})
    """The whole of `[schedule]`, over the steps of the stage."""
    spikes: dict[str, Any] = Field(default={})
    """Keys of `[spikes]`."""
    parallel: dict[str, Any] = Field(default={})
    """Keys of `[parallel]`: another layout of the same ranks."""
    evaluation: dict[str, Any] = Field(default={})
    """Keys of `[evaluation]`."""
    checkpoint: dict[str, Any] = Field(default={})
    """Keys of `[checkpoint]`."""


_TABLES = tuple(name for name in StageConfig.model_fields if name not in ("name", "reset_optimizer"))


def stage_tables(recipe: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of a recipe in one of its stages; both as read from TOML or JSON."""
    base = {key: value for key, value in recipe.items() if key != STAGE}
    own = {key: value for key, value in stage.items() if key in _TABLES and value not in (None, {})}
    return merge_tables(_without_replaced(base, own), own)


def _without_replaced(base: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` without the tables that `child` sets as a whole."""
    kept = {}
    for key, value in base.items():
        inner = child.get(key)
        if key in _REPLACED and inner:
            continue
        if isinstance(value, dict) and isinstance(inner, dict):
            kept[key] = _without_replaced(value, inner)
        else:
            kept[key] = value
    return kept


def split_stages(merged: MergedConfig) -> list[MergedConfig]:
    """Return the tables of a recipe in each of its stages, with the origin of each key; empty without stages."""
    stages = merged.data.get(STAGE)
    base = {key: origin for key, origin in merged.origins.items() if key[:1] != (STAGE,)}
    result = []
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict):
            own = {key[2:]: origin for key, origin in merged.origins.items() if key[:2] == (STAGE, number)}
            own = {key: origin for key, origin in own.items() if key[:1] and key[0] in _TABLES}
            result.append(MergedConfig(stage_tables(merged.data, stage), base | own))
    return result


def stage_names(merged: MergedConfig) -> list[object]:
    """Return the names of a recipe's stages, as many as `split_stages` returns tables."""
    stages = merged.data.get(STAGE)
    return [stage.get("name") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def override_recipe(source: MergedConfig, assignment: str) -> None:
    """Merge `key.sub=value` into a recipe, or add it to the mistakes if it is malformed.

    A key that stages set is changed in each of them; `stage.NAME.key.sub=value` changes one stage.
    """
    found = read_override(source, assignment)
    if found is None:
        return
    stages = source.data.get(STAGE)
    if not has_names(stages) or found.path == (STAGE,):
        apply_override(source, found)
        return
    names = [stage["name"] for stage in stages]
    if found.path[0] == STAGE:
        _, name, *keys = found.path
        if name in names and keys:
            _override_stage(source, names.index(name), replace(found, path=tuple(keys)))
        else:
            source.mistakes.append(
                f"command line: {'.'.join(found.path)}: should be {STAGE}.NAME.key with a stage of {', '.join(names)}"
            )
        return
    for number, stage in enumerate(stages):
        if _sets(stage, found.path):
            _override_stage(source, number, found)
    apply_override(source, found)


def _override_stage(source: MergedConfig, number: int, found: Override) -> None:
    stages = list(source.data[STAGE])
    stages[number] = merge_tables(stages[number], nested(found.path, found.value))
    source.data = {**source.data, STAGE: stages}
    at: Key = (STAGE, number, *found.path)
    source.origins |= {(*at, *key): COMMAND_LINE for key in found.inner_keys}


def _sets(stage: Mapping[str, Any], path: Sequence[str]) -> bool:
    """Return whether a stage sets the key at `path`, or the whole table that it is in."""
    value: Any = stage
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
        if part in _REPLACED:
            return True
    return True


def with_required(root: type[BaseModel], merged: MergedConfig, first: MergedConfig) -> MergedConfig:
    """Return a recipe with the required keys that it leaves to its stages, with the values of the `first` one."""
    data, origins = dict(merged.data), dict(merged.origins)
    for name, field in root.model_fields.items():
        table, of_first = data.get(name, {}), first.data.get(name)
        if not isinstance(table, dict) or not isinstance(of_first, dict) or not _is_table(field.annotation):
            continue
        required = [key for key, inner in field.annotation.model_fields.items() if inner.is_required()]
        if not ALTERNATIVES.keys() & table.keys():
            required += [key for key in ALTERNATIVES if key in field.annotation.model_fields]
        missing = [key for key in required if key in of_first and key not in table]
        data[name] = {key: of_first[key] for key in missing} | table
        origins |= {(name, key): first.origin((name, key)) for key in missing}
    return replace(merged, data=data, origins=origins)


def _is_table(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def check_stages(stages: object, engine: object = "torch") -> list[Mistake]:
    """Return the mistakes of `[[stage]]` beside those of each stage's tables: names given twice, keys of the run."""
    mistakes, names = [], set()
    for number, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
        if not isinstance(stage, dict):
            continue
        at: Key = (STAGE, number)
        if stage.get("name") in names:
            mistakes.append(Mistake((*at, "name"), f"{stage['name']!r} is the name of an earlier stage"))
        names.add(stage.get("name"))
        if engine == "megatron" and stage.get("reset_optimizer") is True:
            text = "engine = 'megatron' reads weights and optimizer states together; leave it out"
            mistakes.append(Mistake((*at, "reset_optimizer"), text))
        for key, _ in flattened(stage):
            path = (*at, *key.split("."))
            model_key = key.removeprefix("model.")
            if key in _FIXED:
                mistakes.append(Mistake(path, "is a key of the whole run, which no stage changes"))
            elif model_key != key and ".".join(model_key.split(".")[:2]) not in position_keys():
                mistakes.append(
                    Mistake(
                        path, f"no stage changes the model's tensors; it may set {', '.join(sorted(position_keys()))}"
                    )
                )
    return mistakes

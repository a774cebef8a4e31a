"""Hugging Face conversion: transformers models, as safetensors, to weights of the built-in model and back.

Each family (`longctx.convert.families`) defines the built-in configuration of a `config.json` and the row table of its
tensors, for both directions. Tensors are read and written in buffers of at most `BUFFER_BYTES`: in memory are one such
buffer, the one written before, and the rows being read (import) or the file being written (export).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from longctx.checkpoint.checksums import write_checksums
from longctx.checkpoint.weights import find_weights, shapes_of, stored_config, write_weights
from longctx.config import Config, flattened
from longctx.convert.families import FAMILIES, Family
from longctx.convert.families.base import Keys
from longctx.convert.row_table import CachedRows, MappedTensor, RowTable, gather_rows, lazy_tensor, rows_per_buffer
from longctx.convert.tensor_files import (
    CONFIG,
    DTYPES,
    TensorFolder,
    file_names,
    group_by_size,
    read_json,
    write_file,
    write_index,
    write_json,
)
from longctx.data.staging import naming_disk_errors, staging
from longctx.errors import UserError
from longctx.files import absolute, sync, temporary_folder
from longctx.mixers.lightning import LightningConfig
from longctx.model.config import ModelConfig
from longctx.recipe.emit import dump
from longctx.recipe.explain import explain_validation_error
from longctx.recipe.loading import load_as
from longctx.recipe.sources import dotted

RECIPE = "model.toml"
"""File with the `[model]` table of an imported model, for a recipe to extend."""
Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TRAINING_KEYS = {"moe.balance", "moe.z", "moe.jitter", "moe.capacity"}
"""Keys of `[model]` that affect only training, not the model's output."""


class _ModelTable(Config):
    model: ModelConfig


@dataclass(frozen=True)
class HuggingFaceSummary:
    """Summary of a conversion."""

    parameters: int
    model_type: str
    source: Path
    files: int


def from_huggingface(source: Path, out: Path, overrides: Sequence[str] = ()) -> HuggingFaceSummary:
    """Import the model in the folder `source` into the new directory `out`: its weights, float32, and its `[model]`
    table. `overrides` (`key=value`, as for training) may change keys that affect only training, such as `moe.balance`.

    Raises UserError, before anything is written, if the built-in model does not support the model, if files are missing
    or damaged, if their tensors do not match the configuration, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    values = _read_config(source)
    family, model, vocab_size = _read_model(source, values)
    model = _apply_overrides(model, overrides)
    table = family.table(model, shapes_of(model, vocab_size))
    files = TensorFolder(source)
    _check_tensors(files, family, model, values, table)
    tensors = {name: lazy_tensor(mapped, files.read_rows) for name, mapped in table.ours.items()}
    origin = {
        "command": "longctx convert from-huggingface",
        "source": str(source.resolve()),
        "model_type": family.model_type,
    }
    path = absolute(out)
    with staging(path) as folder, naming_disk_errors(path):
        write_weights(folder, tensors, stored_config(model, vocab_size), origin)
        (folder / RECIPE).write_text(dump(_ModelTable(model=model)), encoding="utf-8")
        sync(folder / RECIPE)
    count = sum(mapped.shape.numel() for mapped in table.ours.values())
    return HuggingFaceSummary(count, family.model_type, source, len({stored.file for stored in files.tensors.values()}))


def _read_config(source: Path) -> dict[str, Any]:
    if not (source / CONFIG).is_file():
        raise UserError(f"{source} has no {CONFIG}: use the folder of a model saved by transformers")
    return read_json(source / CONFIG)


def _read_model(source: Path, values: Mapping[str, Any]) -> tuple[Family, ModelConfig, int]:
    """Return the family, the built-in configuration and the vocabulary size of a `config.json`."""
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise UserError(
            f"{source / CONFIG}: model_type: {values.get('model_type')!r} is not supported, only {', '.join(FAMILIES)}"
        )
    model, problems = built_in_config(family, values)
    if model is None or problems:
        raise UserError("\n".join([f"{source / CONFIG} cannot be converted:", *problems]))
    assert model.vocab_size is not None
    return family, model, model.vocab_size


def _apply_overrides(model: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """Apply `key=value` overrides. Raises UserError if they change the model's output."""
    if not overrides:
        return model
    with temporary_folder("convert") as folder:
        file = folder / RECIPE
        file.write_text(dump(_ModelTable(model=model)), encoding="utf-8")
        result = load_as(_ModelTable, file, overrides).model
    changed = sorted(_model_differences(result, model))
    if changed:
        allowed = ", ".join(f"model.{key}" for key in sorted(_TRAINING_KEYS))
        raise UserError(f"only {allowed} can be overridden, the rest is fixed by the source: {'; '.join(changed)}")
    return result


def built_in_config(family: Family, values: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """Return the built-in configuration of a `config.json`, None if there is none, and its mistakes."""
    keys = Keys(values)
    names = keys.raw("architectures")
    if names is not None and (not isinstance(names, list) or family.architecture not in names):
        keys.problems.append(f"architectures: {names!r} is not supported, only ['{family.architecture}']")
    keys.only("is_causal", True, why="all layers are causal")
    fields = family.read(keys)
    keys.refuse_unread()
    if keys.problems:
        return None, keys.problems
    try:
        return ModelConfig.model_validate_json(json.dumps(fields)), []
    except ValidationError as error:
        mistakes = explain_validation_error(error, ModelConfig, fields)
        return None, [f"as the built-in model: {dotted(mistake.key)}: {mistake.text}" for mistake in mistakes]


def _check_tensors(
    files: TensorFolder,
    family: Family,
    model: ModelConfig,
    values: Mapping[str, Any],
    table: RowTable,
) -> None:
    """Raise UserError, naming every mistake, unless the files have the tensors of the model."""
    stored, expected, derived, mistakes = files.tensors, table.theirs, family.derived(model, values), []
    embedding = table.ours["embedding.weight"].ranges[0].name
    for name, mapped in expected.items():
        if name not in stored:
            mistakes.append(f"{name} {list(mapped.shape)} is missing")
        elif stored[name].shape != mapped.shape:
            mistakes.append(f"{name} is {list(stored[name].shape)}, expected {list(mapped.shape)}")
        elif stored[name].dtype not in DTYPES:
            mistakes.append(f"{name} is stored as {stored[name].dtype}, expected {', '.join(DTYPES)}")
    for name in stored.keys() - expected.keys():
        if name == "lm_head.weight" and model.tie_embeddings:
            if embedding in stored and not _equal(files, name, embedding):
                mistakes.append(f"{name} differs from the embedding, but {CONFIG} has tie_word_embeddings")
        elif name in derived:
            mistakes += _check_derived(files, name, derived[name]())
        elif not family.ignores(name):
            mistakes.append(f"{name} {list(stored[name].shape)} is unknown")
    if mistakes:
        raise UserError("\n".join([f"the tensors of {files.folder} do not match its {CONFIG}:", *sorted(mistakes)]))


def _equal(files: TensorFolder, name: str, other: str) -> bool:
    """Return whether two tensors of a folder are equal."""
    shape = files.tensors[name].shape
    step = rows_per_buffer(shape)
    return shape == files.tensors[other].shape and all(
        torch.equal(files.read_rows(name, begin, begin + step), files.read_rows(other, begin, begin + step))
        for begin in range(0, shape[0], step)
    )


def _check_derived(files: TensorFolder, name: str, expected: Tensor) -> list[str]:
    """Return a mistake if a tensor differs from the value computed from the configuration, beyond rounding."""
    stored = files.tensors[name]
    if stored.shape != expected.shape or stored.dtype not in DTYPES:
        return [f"{name} is {list(stored.shape)} {stored.dtype}, expected {list(expected.shape)}"]
    actual = files.read_rows(name, 0, len(expected)).view(expected.shape)
    # These are powers of decays below 1, whose absolute rounding error is at most the relative one.
    bound = 8 * torch.finfo(DTYPES[stored.dtype]).eps
    equal = torch.allclose(actual, expected, rtol=bound, atol=bound)
    return [] if equal else [f"{name} does not match the configuration"]


def to_huggingface(source: Path, out: Path, dtype: Dtype = "fp32", shard_size: int = 5 * 10**9) -> HuggingFaceSummary:
    """Export a model for transformers into the new directory `out`: `config.json`, and safetensors files of at most
    `shard_size` bytes or one larger tensor.

    `source` is a checkpoint, a run's directory (its latest checkpoint), or the output of `longctx convert`. Raises
    UserError, before anything is written, if transformers does not support the model, naming the unsupported keys, if
    the source is damaged, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    weights = find_weights(source, "as SOURCE")
    weights.verify_content()
    model, vocab_size = weights.checked_model()
    family, config = _find_family(weights.path, model)
    mapped = family.table(model, shapes_of(model, vocab_size)).theirs
    derived = family.derived(model, config)
    shapes = {name: tensor.shape for name, tensor in mapped.items()}
    shapes |= {name: make().shape for name, make in derived.items()}
    sizes = {name: shape.numel() * _DTYPES[dtype].itemsize for name, shape in shapes.items()}
    groups = group_by_size(sizes, shard_size)
    names = file_names(len(groups))
    rows = CachedRows(weights)
    path = absolute(out)
    with staging(path) as folder, naming_disk_errors(path):
        for file, group in zip(names, groups, strict=True):
            tensors = {
                name: derived[name]().to(_DTYPES[dtype]) if name in derived else _gather(mapped[name], dtype, rows)
                for name in group
            }
            write_file(folder / file, tensors)
            del tensors
        count = sum(shape.numel() for shape in shapes.values())
        if len(groups) > 1:
            write_index(folder, zip(names, groups, strict=True), count, sum(sizes.values()))
        header = {"architectures": [family.architecture], "model_type": family.model_type}
        stored = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        write_json(folder / CONFIG, {**config, **header, "dtype": stored})
        write_checksums(folder, "*.safetensors")
    return HuggingFaceSummary(count, family.model_type, weights.path, len(groups))


def _gather(mapped: MappedTensor, dtype: Dtype, source: CachedRows) -> Tensor:
    """Return a tensor of the exported model."""
    rows = sum(item.rows for item in mapped.ranges)
    columns = mapped.shape[-1:] if len(mapped.shape) > 1 else mapped.shape[1:]
    out = torch.empty(rows, *columns, dtype=_DTYPES[dtype])
    return gather_rows(mapped.ranges, 0, rows, out, source.read_rows).view(mapped.shape)


def _find_family(path: Path, model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Return the family that supports a model, and its `config.json`. Raises UserError that names the unsupported keys
    if there is none."""
    letters, ffns = set(model.pattern), set(model.feed_forwards)
    candidates = [f for f in FAMILIES.values() if letters <= set(f.letters) and ffns <= set(f.ffns)]
    closest: tuple[Family, list[str]] | None = None
    for family in candidates:
        config = family.write(model)
        read_back, problems = built_in_config(family, config)
        inexact = problems or sorted(_model_differences(model, read_back))
        if not inexact:
            return family, config
        if closest is None or len(inexact) < len(closest[1]):
            closest = family, inexact
    if closest is None:
        supported = "; ".join(
            f"{family.model_type}: {family.letters} with {' or '.join(family.ffns)}" for family in FAMILIES.values()
        )
        raise UserError(
            f"{path}: no model of transformers has layers {''.join(sorted(letters))} (model.layers) with "
            f"{', '.join(sorted(ffns))} (model.ffn); supported are {supported}"
        )
    raise UserError(
        f"{path}: no model of transformers is equal; the closest, {closest[0].architecture}, differs in "
        f"{'; '.join(closest[1])}"
    )


def _model_differences(model: ModelConfig, expected: ModelConfig | None) -> Iterable[str]:
    """Describe each key, except those of training, in which two models differ."""
    assert expected is not None
    values, expected_values = resolved(model), resolved(expected)
    for key in values.keys() | expected_values.keys():
        if key not in _TRAINING_KEYS and values.get(key) != expected_values.get(key):
            yield f"model.{key}: {values.get(key)!r}, expected {expected_values.get(key)!r}"


def resolved(model: ModelConfig) -> dict[str, Any]:
    """Return a configuration as dotted keys with all defaults resolved, so that equal models have equal results."""
    tables: dict[str, Config] = {}
    for layer in range(model.depth):
        mixer, ffn = model.mixer(layer), model.feed_forward(layer)
        tables[mixer.name] = mixer.resolved(model.dim)
        if isinstance(mixer, LightningConfig) and mixer.norm_eps is None:
            tables[mixer.name] = mixer.resolved(model.dim).model_copy(update={"norm_eps": model.norm_eps})
        if ffn is not None:
            tables[ffn.name] = ffn.resolved(model.dim)
    values = model.model_dump(mode="json") | {name: table.model_dump(mode="json") for name, table in tables.items()}
    values |= {"layers": model.pattern, "ffn": list(model.feed_forwards)}
    values["residual"] = {name: factors for name, factors in (model.residual or {}).items() if factors != (1, 1)}
    return {key: value for key, value in flattened(values) if value is not None}

"""Models of transformers, as safetensors, to weights of the built-in one and back.

Which built-in model a `config.json` is, and which row of which tensor lies where, is said once for each family
(`longctx.convert.families`). Tensors are read and written piece by piece: besides a piece of `PIECE` bytes and the one
written before, an import holds what it reads of a source's tensor, an export the file that it writes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from longctx.checkpoint.weights import described, find_weights, shapes_of, write_weights
from longctx.config import Config
from longctx.convert.families import FAMILIES, Family
from longctx.convert.families.base import Keys
from longctx.convert.row_table import Blocks, RowTable, Whole, at_once, gather, made
from longctx.convert.tensor_files import (
    CONFIG,
    DTYPES,
    TensorFolder,
    file_names,
    read_json,
    shards,
    write_file,
    write_index,
    write_json,
)
from longctx.data.staging import naming_disk_errors, staging
from longctx.errors import UserError
from longctx.files import sync
from longctx.mixers.lightning import LightningConfig
from longctx.model.config import ModelConfig
from longctx.recipe.emit import dump
from longctx.recipe.explain import explain
from longctx.recipe.loading import load_as
from longctx.recipe.sources import dotted

RECIPE = "model.toml"
"""The `[model]` table of what was imported, for a recipe to extend."""
Dtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_OF_TRAINING = {"moe.balance", "moe.z", "moe.jitter", "moe.capacity"}
"""Keys of `[model]` that say how a model is trained, and not what it computes."""


class _Table(Config):
    model: ModelConfig


@dataclass(frozen=True)
class Converted:
    """What was written."""

    parameters: int
    model_type: str
    source: Path
    files: int


def from_huggingface(source: Path, out: Path, overrides: Sequence[str] = ()) -> Converted:
    """Write the weights of the model in the folder `source` into the new directory `out`, float32, and beside them the
    `[model]` table that they are of. `overrides`, as for training, may change how it is trained (`moe.balance`).

    Raises UserError, before anything is written, where the built-in model cannot be that model, where the files are not
    whole, or where their tensors are not those of the configuration; and where `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    values = _read_config(source)
    family, model, rows = _model_of(source, values)
    model = _overridden(model, overrides)
    table = family.table(model, shapes_of(model, rows))
    files = TensorFolder(source)
    _check_tensors(files, family, model, values, table)
    tensors = {name: made(whole, files.rows) for name, whole in table.ours.items()}
    origin = {
        "command": "longctx convert from-huggingface",
        "source": str(source.resolve()),
        "model_type": family.model_type,
    }
    path = out.expanduser().resolve()
    with staging(path) as folder, naming_disk_errors(path):
        write_weights(folder, tensors, described(model, rows), origin)
        (folder / RECIPE).write_text(dump(_Table(model=model)), encoding="utf-8")
        sync(folder / RECIPE)
    count = sum(whole.shape.numel() for whole in table.ours.values())
    return Converted(count, family.model_type, source, len({stored.file for stored in files.tensors.values()}))


def _read_config(source: Path) -> dict[str, Any]:
    if not (source / CONFIG).is_file():
        raise UserError(f"{source} has no {CONFIG}: give the folder of a model that transformers wrote")
    return read_json(source / CONFIG)


def _model_of(source: Path, values: Mapping[str, Any]) -> tuple[Family, ModelConfig, int]:
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"{source / CONFIG}: model_type: {values.get('model_type')!r} is not known; there are {known}")
    model, problems = built_in(family, values)
    if model is None or problems:
        raise UserError("\n".join([f"{source / CONFIG} is of no model that can be converted:", *problems]))
    assert model.vocab_size is not None
    return family, model, model.vocab_size


def _overridden(model: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """Raises UserError where what is computed would be another thing."""
    if not overrides:
        return model
    with TemporaryDirectory() as folder:
        file = Path(folder) / RECIPE
        file.write_text(dump(_Table(model=model)), encoding="utf-8")
        other = load_as(_Table, file, overrides).model
    found = sorted(_in_the_way(other, model))
    if found:
        allowed = ", ".join(f"model.{key}" for key in sorted(_OF_TRAINING))
        raise UserError(f"only {allowed} may be given, the rest is the source's: {'; '.join(found)}")
    return other


def built_in(family: Family, values: Mapping[str, Any]) -> tuple[ModelConfig | None, list[str]]:
    """The built-in configuration that a `config.json` is of, None where there is none, and what is wrong, in words."""
    keys = Keys(values)
    names = keys.raw("architectures")
    if names is not None and (not isinstance(names, list) or family.architecture not in names):
        keys.problems.append(f"architectures: {names!r}, where ['{family.architecture}'] can be converted")
    keys.only("is_causal", True, why="every layer here sees earlier tokens alone")
    fields = family.read(keys)
    keys.refuse_the_rest()
    if keys.problems:
        return None, keys.problems
    try:
        return ModelConfig.model_validate_json(json.dumps(fields)), []
    except ValidationError as error:
        found = explain(error, ModelConfig, fields)
        return None, [f"as the built-in model: {dotted(mistake.key)}: {mistake.text}" for mistake in found]


def _check_tensors(
    files: TensorFolder,
    family: Family,
    model: ModelConfig,
    values: Mapping[str, Any],
    table: RowTable,
) -> None:
    """Raise UserError, naming every mistake, unless the files have the tensors of the model."""
    there, wanted, derived, mistakes = files.tensors, table.theirs, family.derived(model, values), []
    embedding = table.ours["embedding.weight"].runs[0].name
    for name, whole in wanted.items():
        if name not in there:
            mistakes.append(f"{name} {list(whole.shape)} is missing")
        elif there[name].shape != whole.shape:
            mistakes.append(f"{name} is {list(there[name].shape)}: expected {list(whole.shape)}")
        elif there[name].dtype not in DTYPES:
            mistakes.append(f"{name} is stored as {there[name].dtype}: expected {', '.join(DTYPES)}")
    for name in there.keys() - wanted.keys():
        if name == "lm_head.weight" and model.tie_embeddings:
            if embedding in there and not _equal(files, name, embedding):
                mistakes.append(f"{name} is not the embedding, and {CONFIG} has tie_word_embeddings")
        elif name in derived:
            mistakes += _differs(files, name, derived[name]())
        elif not family.passed_over(name):
            mistakes.append(f"{name} {list(there[name].shape)} is not known")
    if mistakes:
        raise UserError("\n".join([f"{files.folder} does not have the tensors of its {CONFIG}:", *sorted(mistakes)]))


def _equal(files: TensorFolder, name: str, other: str) -> bool:
    """Whether two tensors of a folder are equal."""
    shape = files.tensors[name].shape
    step = at_once(shape)
    return shape == files.tensors[other].shape and all(
        torch.equal(files.rows(name, at, at + step), files.rows(other, at, at + step))
        for at in range(0, shape[0], step)
    )


def _differs(files: TensorFolder, name: str, wanted: Tensor) -> list[str]:
    """Words where a tensor that follows from the configuration is another one, beyond the roundings of its dtype."""
    stored = files.tensors[name]
    if stored.shape != wanted.shape or stored.dtype not in DTYPES:
        return [f"{name} is {list(stored.shape)} {stored.dtype}: expected {list(wanted.shape)}"]
    got = files.rows(name, 0, len(wanted)).view(wanted.shape)
    # They are decays: of a power of one that is rounded the absolute error is no larger than the relative one.
    bound = 8 * torch.finfo(DTYPES[stored.dtype]).eps
    return [] if torch.allclose(got, wanted, rtol=bound, atol=bound) else [f"{name} is not that of the configuration"]


def to_huggingface(source: Path, out: Path, dtype: Dtype = "fp32", shard_size: int = 5 * 10**9) -> Converted:
    """Write a model that transformers loads into the new directory `out`: `config.json`, and safetensors files of at
    most `shard_size` bytes, or of one tensor that is larger.

    `source` is a checkpoint, a run's directory (its newest one is taken), or what `longctx convert` wrote. Raises
    UserError, before anything is written, where no class of transformers has its model, naming the keys that are in
    the way, where it is damaged, and where `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    weights = find_weights(source, "as SOURCE")
    model, rows = weights.whole_model()
    family, config = _family_of(weights.path, model)
    wholes = family.table(model, shapes_of(model, rows)).theirs
    derived = family.derived(model, config)
    shapes = {name: whole.shape for name, whole in wholes.items()}
    shapes |= {name: make().shape for name, make in derived.items()}
    size = {name: shape.numel() * _DTYPES[dtype].itemsize for name, shape in shapes.items()}
    groups = shards(size, shard_size)
    names = file_names(len(groups))
    blocks = Blocks(weights)
    path = out.expanduser().resolve()
    with staging(path) as folder, naming_disk_errors(path):
        for file, group in zip(names, groups, strict=True):
            tensors = {
                name: derived[name]().to(_DTYPES[dtype]) if name in derived else _made(wholes[name], dtype, blocks)
                for name in group
            }
            write_file(folder / file, tensors)
            del tensors
        count = sum(shape.numel() for shape in shapes.values())
        if len(groups) > 1:
            write_index(folder, zip(names, groups, strict=True), count, sum(size.values()))
        words = {"architectures": [family.architecture], "model_type": family.model_type}
        stored = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        write_json(folder / CONFIG, {**config, **words, "dtype": stored})
    return Converted(count, family.model_type, weights.path, len(groups))


def _made(whole: Whole, dtype: Dtype, blocks: Blocks) -> Tensor:
    """One of their tensors."""
    rows = sum(run.rows for run in whole.runs)
    columns = whole.shape[-1:] if len(whole.shape) > 1 else whole.shape[1:]
    out = torch.empty(rows, *columns, dtype=_DTYPES[dtype])
    return gather(whole.runs, 0, rows, out, blocks.rows).view(whole.shape)


def _family_of(path: Path, model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that a model is of, and its `config.json`. Raises UserError that names what is in the way of it."""
    letters, ffns = set(model.pattern), set(model.feed_forwards)
    able = [f for f in FAMILIES.values() if letters <= set(f.letters) and ffns <= set(f.ffns)]
    nearest: tuple[Family, list[str]] | None = None
    for family in able:
        config = family.write(model)
        found, problems = built_in(family, config)
        inexact = problems or sorted(_in_the_way(model, found))
        if not inexact:
            return family, config
        if nearest is None or len(inexact) < len(nearest[1]):
            nearest = family, inexact
    if nearest is None:
        there = "; ".join(
            f"{family.model_type}: {family.letters} with {' or '.join(family.ffns)}" for family in FAMILIES.values()
        )
        raise UserError(
            f"{path}: no class of transformers has layers {''.join(sorted(letters))} (model.layers) with "
            f"{', '.join(sorted(ffns))} (model.ffn); there are {there}"
        )
    raise UserError(
        f"{path}: no class of transformers has this model; in the way of {nearest[0].architecture} are "
        f"{'; '.join(nearest[1])}"
    )


def _in_the_way(model: ModelConfig, other: ModelConfig | None) -> Iterable[str]:
    """What a model has that another, which should be the same, has not."""
    assert other is not None
    ours, theirs = resolved(model), resolved(other)
    for key in ours.keys() | theirs.keys():
        if key not in _OF_TRAINING and ours.get(key) != theirs.get(key):
            yield f"model.{key}: {ours.get(key)!r} here, {theirs.get(key)!r} there"


def resolved(model: ModelConfig) -> dict[str, Any]:
    """A configuration by dotted keys, with what it leaves to be derived: two of one model are equal."""
    tables: dict[str, Config] = {}
    for layer in range(model.depth):
        mixer, ffn = model.mixer(layer), model.feed_forward(layer)
        tables[mixer.name] = mixer.resolved(model.dim)
        if isinstance(mixer, LightningConfig) and mixer.norm_eps is None:
            tables[mixer.name] = mixer.resolved(model.dim).model_copy(update={"norm_eps": model.norm_eps})
        if ffn is not None:
            tables[ffn.name] = ffn.resolved(model.dim)
    said = model.model_dump(mode="json") | {name: table.model_dump(mode="json") for name, table in tables.items()}
    said |= {"layers": model.pattern, "ffn": list(model.feed_forwards)}
    said["residual"] = {name: factors for name, factors in (model.residual or {}).items() if factors != (1, 1)}
    return dict(_flattened(said))


def _flattened(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value

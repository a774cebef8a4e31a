"""Initial weights: read from a checkpoint or from a folder written by `longctx convert`.

Such a folder has the model's tensors in the checkpoint format and `weights.json`: the model's configuration, the origin
of the weights, and the size of every other file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from longctx.checkpoint.checksums import checksum, find_changed, stored_checksums, unseal
from longctx.checkpoint.compare_models import tensor_differences
from longctx.checkpoint.lazy_tensors import LazyTensor, write_lazy
from longctx.checkpoint.read import (
    TRAINER,
    check_format,
    list_checkpoints,
    read_checksums,
    read_state,
    suggest_alternative,
)
from longctx.checkpoint.storage import Reader, RegionPlanner, content_of, find_damage, read_tensors, write_listing
from longctx.errors import UserError
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder

CONVERTED = "weights.json"
"""The listing file of converted weights."""
_PREFIX = "model."
_PARTIAL = re.compile(r".*\.partial(-[0-9a-f]+)?")


@dataclass(frozen=True)
class Weights:
    """A complete set of weights on disk."""

    path: Path
    how: str
    """How weights are named on the command line ("with train.init=DIR"), for error messages."""
    model: dict[str, Any]
    """The model's configuration, with `vocab_size` set to the rows of the embedding."""
    digest: str
    """SHA-256 of the listing: equal on machines that see the same weights."""
    step: int | None
    """Step of a checkpoint; None for converted weights."""
    checksums: dict[str, str]
    """Checksum of each file; empty where an earlier version of longctx wrote them."""

    def verify_content(self) -> None:
        """Compare the files with their checksums. A collective call if there is a process group, whose ranks share the
        files. Raises UserError, on every rank, if a file has changed."""
        changed = find_changed(self.path, self.checksums)
        if changed is not None:
            advice = "Convert again" if self.step is None else suggest_alternative(self.path, self.how)
            raise UserError(f"{self.path} is damaged: {changed}. {advice}")

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.path)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the model's tensors, by name. Raises UserError if the metadata cannot be read."""
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except UserError as error:
            advice = suggest_alternative(self.path, self.how)
            raise UserError(f"{self.path} cannot be read: {error}. {advice}") from error
        return {
            name.removeprefix(_PREFIX): entry.size
            for name, entry in entries.items()
            if name.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """Read a full tensor, float32 on the CPU; not a collective call. Raises UserError if it cannot be read."""
        tensor = torch.empty(self.shapes[name])
        self._read({f"{_PREFIX}{name}": tensor}, no_dist=True)
        return tensor

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read rows [begin, end) of a tensor; otherwise as `read`."""
        rows = torch.empty(end - begin, *self.shapes[name][1:])
        self._read({f"{_PREFIX}{name}": rows}, RegionPlanner(begin), no_dist=True)
        return rows

    def checked_model(self) -> tuple[ModelConfig, int]:
        """Return the model's configuration and vocabulary size. Raises UserError if this version does not support the
        model, or if the tensors do not match it."""
        config = parse_model(self.path, self.model)
        assert config.vocab_size is not None
        self.check(config, config.vocab_size)
        return config, config.vocab_size

    def check(self, config: ModelConfig, vocab_size: int) -> None:
        """Raise UserError, naming every difference, unless the weights are of this model. Positions and masks, which
        have no tensors (`ModelConfig`'s `position_keys`), may differ."""
        found = tensor_differences(self.model, stored_config(config, vocab_size))
        if not found:
            found = shape_differences(self.shapes, shapes_of(config, vocab_size))
        if found:
            raise UserError(
                f"{self.path} has the weights of another model: {'; '.join(found)}. Use other weights {self.how}"
            )

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into a model, which may be sharded; a collective call. Raises UserError if that fails."""
        self.fill(get_model_state_dict(model))

    def fill(self, tensors: dict[str, Any]) -> None:
        """Load the weights into named tensors, which may be sharded; otherwise as `load_into`."""
        self._read({_PREFIX.removesuffix("."): tensors})

    def _read(self, tensors: dict[str, Any], planner: RegionPlanner | None = None, *, no_dist: bool = False) -> None:
        try:
            read_tensors(self.path, tensors, self._reader, planner, no_dist=no_dist)
        except UserError as error:
            raise UserError(f"{error}. {suggest_alternative(self.path, self.how)}") from error


def find_weights(path: Path, how: str) -> Weights:
    """Find the weights in `path`: a checkpoint, the latest one of a run, or the output of `longctx convert`.

    `how` is how weights are named on the command line, for error messages. Raises UserError if there are none, or a
    file is missing or truncated.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory. Use weights {how}: {_KINDS}")
    if _PARTIAL.fullmatch(path.name):
        raise UserError(f"{path} is incomplete: its writer was stopped. {suggest_alternative(path, how)}")
    if (path / CONVERTED).is_file():
        return _converted(path, how)
    if not (path / TRAINER).is_file():
        checkpoints = list_checkpoints(path / "checkpoints")
        if not checkpoints:
            raise UserError(f"{path} has no weights. Use weights {how}: {_KINDS}")
        path = checkpoints[-1]
    state = read_state(path, how)
    check_format(path, state, "torch", f"Convert it first: longctx convert from-megatron {path} --out DIR")
    checksums = read_checksums(path, how)
    return Weights(path, how, with_defaults(state.model), _digest(path / TRAINER), state.step, checksums)


_KINDS = "a checkpoint, the directory of a run with a checkpoint, or the output of longctx convert"


def _converted(path: Path, how: str) -> Weights:
    try:
        content = unseal((path / CONVERTED).read_text(encoding="utf-8"))
        model, files, checksums = dict(content["model"]), dict(content["files"]), stored_checksums(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {CONVERTED} cannot be read ({error}). Convert again") from error
    damage = find_damage(path, files)
    if damage is not None:
        raise UserError(f"{path} is damaged: {damage}. Convert again")
    return Weights(path, how, with_defaults(model), _digest(path / CONVERTED), None, checksums)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stored_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return a model's configuration in the form that is stored beside its weights."""
    return {**config.model_dump(mode="json"), "vocab_size": vocab_size}


def parse_model(path: Path, model: Mapping[str, Any]) -> ModelConfig:
    """Parse the configuration stored beside the weights in `path`. Raises UserError if this version does not support
    it."""
    try:
        return ModelConfig.model_validate_json(json.dumps(model))
    except ValidationError as error:
        raise UserError(f"{path} has a model that this version does not support: {error}") from error


def with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of keys that are newer than a checkpoint to the model configuration stored in it."""
    try:
        return ModelConfig.model_validate_json(json.dumps(model)).model_dump(mode="json")
    except ValidationError:
        return model  # the comparison that follows names the differences


def shapes_of(config: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors, by name, without allocating them."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size)
    return {name: tensor.shape for name, tensor in decoder.state_dict().items()}


def shape_differences(actual: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """Describe each tensor in which two models differ."""

    def displayed(shapes: Mapping[str, torch.Size], name: str) -> str:
        return str(list(shapes[name])) if name in shapes else "none"

    return [
        f"{name}: {displayed(actual, name)}, expected {displayed(expected, name)}"
        for name in sorted({*actual, *expected})
        if actual.get(name) != expected.get(name)
    ]


def write_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], model: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Write a model's tensors and `weights.json` into an empty folder, from one process, synced to disk.

    Tensors are materialised and written one after the other. `model` is the result of `stored_config`, `origin`
    describes the source of the weights. An error in materialising or writing a tensor is raised unchanged.
    """
    write_lazy(folder, {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    checksums = {name: checksum(folder / name) for name in content_of(folder)}
    write_listing(folder, CONVERTED, {"model": dict(model), "origin": dict(origin)}, checksums)

"""Weights to begin with: a checkpoint's, or those of a folder that `longctx convert` has written.

Such a folder holds the model's tensors in the format of checkpoints, and `weights.json`: the model's configuration,
where they came from, and the size of every other file.
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

from longctx.checkpoint.lazy_tensors import LazyTensor, write_lazy
from longctx.checkpoint.save import TRAINER, check_format, differences, list_checkpoints, others, read_state
from longctx.checkpoint.storage import Reader, RegionPlanner, damage, read_tensors, write_listing
from longctx.errors import UserError
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder

_WEIGHTS = "weights.json"
_PREFIX = "model."
_PARTIAL = re.compile(r".*\.partial(-[0-9a-f]+)?")


@dataclass(frozen=True)
class Weights:
    """Whole weights on the disk, as their listing says."""

    path: Path
    how: str
    """The way to give other ones, in words."""
    model: dict[str, Any]
    """The model's configuration, with the rows of its vocabulary as `vocab_size`."""
    digest: str
    """Of the listing: the same on two machines where they see the same weights."""
    step: int | None
    """Of a checkpoint."""

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.path)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The model's tensors, by name. Raises UserError where they cannot be read."""
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # what pickle makes of damaged bytes is any of them
            raise UserError(f"{self.path} cannot be read: .metadata: {error}. {others(self.path, self.how)}") from error
        return {
            name.removeprefix(_PREFIX): entry.size
            for name, entry in entries.items()
            if name.startswith(_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        """One of them, whole, float32 on the CPU, by this process alone. Raises UserError where it cannot be read."""
        tensor = torch.empty(self.shapes[name])
        self._read({f"{_PREFIX}{name}": tensor}, alone=True)
        return tensor

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Rows of one of them, from the first number up to the second; the rest as in `read`."""
        rows = torch.empty(end - begin, *self.shapes[name][1:])
        self._read({f"{_PREFIX}{name}": rows}, RegionPlanner(begin), alone=True)
        return rows

    def whole_model(self) -> tuple[ModelConfig, int]:
        """The model that they say they are of, and the rows of its vocabulary. Raises UserError where this version does
        not know it, or they are of another."""
        config = known(self.path, self.model)
        assert config.vocab_size is not None
        self.check(config, config.vocab_size)
        return config, config.vocab_size

    def check(self, config: ModelConfig, rows: int) -> None:
        """Raise UserError, naming every difference, unless they are of this model, with `rows` in its vocabulary."""
        found = differences(self.model, described(config, rows))
        if not found:
            found = shape_differences(self.shapes, shapes_of(config, rows))
        if found:
            raise UserError(f"{self.path} has the weights of another model: {'; '.join(found)}. Give others {self.how}")

    def load_into(self, model: nn.Module) -> None:
        """Read them into a model that may be sharded; every rank calls it. Raises UserError where they cannot be."""
        self.fill(get_model_state_dict(model))

    def fill(self, tensors: dict[str, Any]) -> None:
        """Read them into tensors by name, which may be sharded; as `load_into`."""
        self._read({_PREFIX.removesuffix("."): tensors})

    def _read(self, tensors: dict[str, Any], planner: RegionPlanner | None = None, *, alone: bool = False) -> None:
        try:
            read_tensors(self.path, tensors, self._reader, planner, alone=alone)
        except UserError as error:
            raise UserError(f"{error}. {others(self.path, self.how)}") from error


def find_weights(path: Path, how: str) -> Weights:
    """The weights in `path`: a checkpoint, the newest one of a run's directory, or what `longctx convert` wrote.

    `how` says the way to give other ones. Raises UserError where there are none, or a file is missing or cut short.
    """
    if not path.is_dir():
        raise UserError(f"{path}: there is no such directory. Give weights {how}: {_KINDS}")
    if _PARTIAL.fullmatch(path.name):
        raise UserError(f"{path} was being written when its writer ended: it is not whole. {others(path, how)}")
    if (path / _WEIGHTS).is_file():
        return _converted(path, how)
    if not (path / TRAINER).is_file():
        there = list_checkpoints(path / "checkpoints")
        if not there:
            raise UserError(f"{path} holds no weights. Give others {how}: {_KINDS}")
        path = there[-1]
    state = read_state(path, how)
    check_format(path, state, "torch", f"Make weights of it: longctx convert from-megatron {path} --out DIR")
    return Weights(path, how, with_defaults(state.model), _digest(path / TRAINER), state.step)


_KINDS = "a checkpoint, a run's directory that has one, or what longctx convert wrote"


def _converted(path: Path, how: str) -> Weights:
    try:
        content = json.loads((path / _WEIGHTS).read_text(encoding="utf-8"))
        model, files = dict(content["model"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {_WEIGHTS} cannot be read ({error}). Convert again") from error
    damaged = damage(path, files)
    if damaged is not None:
        raise UserError(f"{path} is damaged: {damaged}. Convert again")
    return Weights(path, how, with_defaults(model), _digest(path / _WEIGHTS), None)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def described(config: ModelConfig, rows: int) -> dict[str, Any]:
    """A model's configuration as it stands beside its weights."""
    return {**config.model_dump(mode="json"), "vocab_size": rows}


def known(path: Path, model: Mapping[str, Any]) -> ModelConfig:
    """The configuration that stands beside weights in `path`. Raises UserError where this version does not know it."""
    try:
        return ModelConfig.model_validate_json(json.dumps(model))
    except ValidationError as error:
        raise UserError(f"{path} is of a model that this version does not know: {error}") from error


def with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's words for its model, with the keys that models have been given since."""
    try:
        return ModelConfig.model_validate_json(json.dumps(model)).model_dump(mode="json")
    except ValidationError:
        return model  # which has differences to name


def shapes_of(config: ModelConfig, rows: int) -> dict[str, torch.Size]:
    """The tensors of a model, by name, without making them."""
    with torch.device("meta"):
        decoder = Decoder(config, rows)
    return {name: tensor.shape for name, tensor in decoder.state_dict().items()}


def shape_differences(there: Mapping[str, torch.Size], here: Mapping[str, torch.Size]) -> list[str]:
    """In which tensors two models differ, in words."""

    def told(shapes: Mapping[str, torch.Size], name: str) -> str:
        return str(list(shapes[name])) if name in shapes else "none"

    return [
        f"{name}: {told(there, name)} there, {told(here, name)} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def write_weights(
    folder: Path, tensors: Mapping[str, LazyTensor], model: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Write a model's tensors and `weights.json` into an empty folder, in one process; on the disk when this returns.

    The tensors are made and written one after the other. `model` is what `described` gives, `origin` says where they
    came from. What goes wrong in making or writing one is raised as it is.
    """
    write_lazy(folder, {f"{_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    write_listing(folder, _WEIGHTS, {"model": dict(model), "origin": dict(origin)})

"""Megatron-Core conversion: checkpoints to weights of the built-in model and back.

Both are torch.distributed.checkpoint folders, read and written without Megatron or a GPU, tensor by tensor in buffers
(`longctx.convert.row_table`). Optimizer and random states in a checkpoint are ignored.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from longctx.checkpoint.compare_models import differences
from longctx.checkpoint.lazy_tensors import LazyTensor, write_lazy
from longctx.checkpoint.read import TRAINER, check_format, list_checkpoints, read_state, verify_content
from longctx.checkpoint.storage import Reader, RegionPlanner, read_tensors
from longctx.checkpoint.weights import find_weights, parse_model, stored_config, with_defaults, write_weights
from longctx.convert.megatron_table import (
    ATTENTION,
    LINEARS,
    NORMS,
    OUTSIDE_LAYERS,
    LayerNames,
    has_own_attention,
    layer_prefix,
    megatron_row_table,
    part_name,
    split_columns,
)
from longctx.convert.row_table import CachedRows, MappedTensor, lazy_tensor, rows_per_buffer
from longctx.data.staging import naming_disk_errors, staging
from longctx.errors import UserError
from longctx.files import absolute, sync
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig

_LATEST = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
"""Megatron's name for a checkpoint of weights only."""
_NOT_MODEL = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")
"""Name prefixes of entries that are not parameters of the model."""
_STACKED = "decoder.layers."


@dataclass(frozen=True)
class MegatronSummary:
    """Summary of a conversion."""

    parameters: int
    source: Path
    model: ModelConfig


class _Checkpoint:
    """The model's tensors in a Megatron checkpoint, by names with the layer's number, whether stacked or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = Reader(folder)
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except UserError as error:
            raise UserError(f"{folder} cannot be read: {error}. Use another checkpoint as SOURCE") from error
        self._stored = {
            name: entry.size
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_NOT_MODEL)
        }
        self.shapes = {name: shape for name, shape, _ in self._unstacked()}
        self._locations = {name: location for name, _, location in self._unstacked()}
        self._joined: dict[str, list[str]] = {}

    def _unstacked(self) -> Iterator[tuple[str, torch.Size, tuple[str, int | None]]]:
        """Yield per layer's tensor its numbered name, its shape, and its stored name and index in the stack."""
        for name, shape in self._stored.items():
            rest = name.removeprefix(_STACKED)
            if not name.startswith(_STACKED) or rest.partition(".")[0].isdigit():
                yield name, shape, (name, None)
            else:
                for number in range(shape[0]):
                    yield layer_prefix(number) + rest, shape[1:], (name, number)

    def join_columns(self, split: Mapping[str, tuple[int, ...]]) -> None:
        """Present tensors that are split by columns, with these widths, as one, if all parts exist."""
        for name, widths in split.items():
            parts = [part_name(name, number) for number in range(len(widths))]
            shapes = [self.shapes.get(part) for part in parts]
            if all(shape is not None and shape[1:] == (width,) for shape, width in zip(shapes, widths, strict=True)):
                self.shapes[name] = torch.Size([self.shapes[parts[0]][0], sum(widths)])
                self._joined[name] = parts
                for part in parts:
                    del self.shapes[part]

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read rows [begin, end) of a tensor, as a `longctx.convert.row_table.ReadRows`."""
        if name in self._joined:
            return torch.cat([self._read_stored(part, begin, end) for part in self._joined[name]], dim=1)
        return self._read_stored(name, begin, end)

    def _read_stored(self, name: str, begin: int, end: int) -> Tensor:
        stored, layer = self._locations[name]
        shape = self._stored[stored] if layer is None else self._stored[stored][1:]
        # Parameters with more than two dims are read in full: all dims but the last are rows.
        direct = len(shape) <= 2
        sizes = (end - begin, *shape[1:]) if direct else tuple(shape)
        offsets = (begin if direct else 0, *[0] * (len(shape) - 1))
        if layer is not None:
            sizes, offsets = (1, *sizes), (layer, *offsets)
        out = torch.empty(sizes)
        read_tensors(self.folder, {stored: out}, self._reader, RegionPlanner(*offsets))
        out = out if layer is None else out[0]
        return out if direct else out.reshape(-1, shape[-1])[begin:end]

    def layer_names(self, number: int) -> LayerNames:
        """Detect how the tensors of a layer are named."""
        prefix = layer_prefix(number)
        norms = {}
        for ours, names in NORMS.items():
            norms[ours] = next((name for name in names if prefix + name in self.shapes), names[0])
        return LayerNames(f"{prefix}{ATTENTION[0]}.weight" in self.shapes, norms)


def find_checkpoint(source: Path) -> Path:
    """Find the checkpoint folder in `source`: `source` itself, or the latest checkpoint of Megatron's directory (with
    `latest_checkpointed_iteration.txt`) or of a run of `engine = "megatron"`. Raises UserError if there is none."""
    if (source / _LATEST).is_file():
        latest = (source / _LATEST).read_text(encoding="utf-8").strip()
        if latest != _RELEASE and not latest.isdigit():
            raise UserError(f"{source / _LATEST}: {latest!r} is neither an iteration nor '{_RELEASE}'")
        source = source / (latest if latest == _RELEASE else f"iter_{int(latest):07d}")
    elif checkpoints := list_checkpoints(source / "checkpoints"):
        source = checkpoints[-1]
    if not (source / ".metadata").is_file():
        raise UserError(
            f"{source} has no .metadata: use as SOURCE a Megatron checkpoint in the format torch_dist, the directory "
            f"with its {_LATEST}, or a run of engine = 'megatron'"
        )
    return source


def from_megatron(source: Path, model: ModelConfig | None, out: Path) -> MegatronSummary:
    """Import the weights of a Megatron checkpoint, float32, into the new directory `out`.

    `model` is the model's configuration; None for a checkpoint of engine = "megatron", which contains it. Raises
    UserError, before anything is written, if tensors of the model are missing or have other shapes, if other tensors
    exist, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    path = find_checkpoint(source)
    checkpoint = _Checkpoint(path)
    vocab_size = checkpoint.shapes.get(OUTSIDE_LAYERS["embedding.weight"], torch.Size([0]))[0]
    model = _source_model(path, model)
    if model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size: {model.vocab_size} in the recipe, but {path} has {vocab_size} rows: set "
            f"model.vocab_size={vocab_size}"
        )
    _check_supported(model)
    if any(checkpoint.layer_names(number).own_attention for number in range(model.depth)):
        _check_attention(model)
    table = megatron_row_table(model, vocab_size, checkpoint.layer_names)
    checkpoint.join_columns(split_columns(model))
    _check_tensors(checkpoint, table.theirs)
    tensors = {name: lazy_tensor(mapped, checkpoint.read_rows) for name, mapped in table.ours.items()}
    origin = {"command": "longctx convert from-megatron", "source": str(path.resolve())}
    final = absolute(out)
    with staging(final) as folder, naming_disk_errors(final):
        write_weights(folder, tensors, stored_config(model, vocab_size), origin)
    return MegatronSummary(sum(mapped.shape.numel() for mapped in table.ours.values()), path, model)


def _source_model(path: Path, recipe_model: ModelConfig | None) -> ModelConfig:
    """Return the model of a checkpoint, from the checkpoint or the recipe. Raises UserError if the two differ, if
    neither has it, or if the checkpoint is damaged or not in Megatron's format."""
    if not (path / TRAINER).is_file():
        if recipe_model is None:
            raise UserError(f"{path} does not contain the model's configuration: add --to RECIPE")
        return recipe_model
    state = read_state(path, "as SOURCE")
    verify_content(path, "as SOURCE")
    check_format(path, state, "megatron", "It needs no conversion: use it as train.init")
    model = parse_model(path, state.model)
    if recipe_model is not None:
        found = differences(with_defaults(state.model), stored_config(recipe_model, model.vocab_size or 0))
        if found:
            raise UserError(f"{path} is of another model than the recipe: {'; '.join(found)}. Remove --to")
    return model


def _check_supported(model: ModelConfig) -> None:
    """Raise UserError, naming every key, if Megatron's layers do not support the model."""
    mistakes = []
    if set(model.feed_forwards) != {SwigluConfig.name}:
        mistakes.append("model.ffn: only dense feed-forwards, 'swiglu', can be converted")
    if model.block != "sequential" or model.residual is not None:
        mistakes.append("model.block, model.residual: only sequential blocks without residual factors can be converted")
    if model.norm != "rms":
        mistakes.append("model.norm: only 'rms' can be converted")
    if mistakes:
        raise UserError("\n".join(mistakes))


def _check_tensors(checkpoint: _Checkpoint, expected: Mapping[str, MappedTensor]) -> None:
    """Raise UserError, naming every mistake, unless the checkpoint has the tensors of the model."""
    shapes = checkpoint.shapes
    mistakes, norms = [], tuple(name for names in NORMS.values() for name in names)
    for name, mapped in expected.items():
        if name not in shapes:
            mistakes.append(f"{name} {list(mapped.shape)} is missing")
        elif shapes[name].numel() != mapped.shape.numel() or shapes[name][-1] != mapped.shape[-1]:
            mistakes.append(f"{name} is {list(shapes[name])}, expected {list(mapped.shape)}")
    mistakes += [
        f"{name} {list(shape)} is not part of the model"
        for name, shape in shapes.items()
        if name not in expected and not name.endswith(norms)
    ]
    if mistakes:
        raise UserError("\n".join([f"{checkpoint.folder} does not match the model:", *sorted(mistakes)]))


def to_megatron(source: Path, out: Path) -> MegatronSummary:
    """Export a checkpoint of weights for Megatron-Core's script (`--load`) into the new directory `out`.

    Softmax layers become Megatron's own attention; other layers and mixtures of heads become the mixers of
    `longctx.adapters.megatron.specs` (see `longctx.convert.megatron_script`). `source` is a checkpoint, a run's
    directory (its latest checkpoint), or the output of `longctx convert`. Raises UserError, before anything is written,
    if Megatron's layers do not support the model, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    weights = find_weights(source, "as SOURCE")
    weights.verify_content()
    model, vocab_size = weights.checked_model()
    _check_supported(model)
    _check_attention(model)
    table = megatron_row_table(model, vocab_size, lambda number: _exported_names(model, number))
    read = CachedRows(weights).read_rows
    tensors = {name: lazy_tensor(mapped, read) for name, mapped in table.theirs.items()}
    for name, widths in split_columns(model).items():
        tensors |= _column_parts(name, tensors.pop(name), widths)
    tensors |= _standalone_norms(model, tensors)
    stacked = len(set(model.pattern)) == 1 and model.mixer(0).same_in_all_layers
    final = absolute(out)
    with staging(final) as folder, naming_disk_errors(final):
        release = folder / _RELEASE
        release.mkdir()
        write_lazy(release, _stacked(model, tensors) if stacked else tensors, _extra_states(model, stacked))
        sizes = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
        common = {"args": argparse.Namespace(**sizes), "checkpoint_version": 3.0, "iteration": 0}
        torch.save(common, release / "common.pt")
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (release / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
        (folder / _LATEST).write_text(_RELEASE, encoding="utf-8")
        for file in (*release.iterdir(), folder / _LATEST):
            sync(file)
    return MegatronSummary(sum(mapped.shape.numel() for mapped in table.ours.values()), weights.path, model)


def _check_attention(model: ModelConfig) -> None:
    """Raise UserError if softmax layers have parameters that Megatron's attention lacks or defines differently."""
    config: SoftmaxConfig | None = getattr(model, SoftmaxConfig.name)
    own = any(has_own_attention(model, number) for number in range(model.depth))
    if own and config is not None and (config.qk_norm is not None or config.output_gate):
        raise UserError(
            "model.softmax: qk_norm and output_gate cannot be converted to or from Megatron's own attention"
        )


def _exported_names(model: ModelConfig, number: int) -> LayerNames:
    return LayerNames(has_own_attention(model, number), {ours: names[0] for ours, names in NORMS.items()})


def _column_parts(name: str, tensor: LazyTensor, widths: Sequence[int]) -> dict[str, LazyTensor]:
    """Split a tensor by columns."""
    parts, begin = {}, 0
    for number, width in enumerate(widths):
        make = partial(_make_columns, tensor, slice(begin, begin + width))
        parts[part_name(name, number)] = LazyTensor(torch.Size([tensor.shape[0], width]), make, tensor.rows)
        begin += width
    return parts


def _make_columns(tensor: LazyTensor, columns: slice, begin: int, end: int) -> Tensor:
    return tensor.make(begin, end)[:, columns]


def _standalone_norms(model: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return copies of the norms before mixers under their second name: Megatron's local layers use one name,
    TransformerEngine's the other."""
    fused, standalone = NORMS["mixer_norm.weight"]
    return {
        layer_prefix(number) + standalone: tensors[layer_prefix(number) + fused]
        for number in range(model.depth)
        if not has_own_attention(model, number)
    }


def _stacked(model: ModelConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Stack the tensors of all layers, which must be equal in structure."""
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith(_STACKED)}
    for name, first in tensors.items():
        if name.startswith(layer_prefix(0)):
            rest = name.removeprefix(layer_prefix(0))
            layers = [tensors[layer_prefix(number) + rest] for number in range(model.depth)]
            shape = torch.Size([model.depth, *first.shape])
            result[_STACKED + rest] = LazyTensor(shape, _stack(layers), rows=rows_per_buffer(shape))
    return result


def _stack(layers: list[LazyTensor]) -> Callable[[int, int], Tensor]:
    return lambda begin, end: torch.stack([layer.make(0, layer.shape[0]) for layer in layers[begin:end]])


def _extra_states(model: ModelConfig, stacked: bool) -> dict[str, Any]:
    """Return the `_extra_state` entries that Megatron reads for every linear module: a list of one empty state."""
    states: dict[str, Any] = {}
    for number in range(model.depth):
        for linear in (*LINEARS, *(ATTENTION if has_own_attention(model, number) else ())):
            prefix, shard = layer_prefix(number), "shard_0_1"
            if stacked:
                prefix, shard = _STACKED, f"shard_{number}_{model.depth}"
            states[f"{prefix}{linear}._extra_state/{shard}"] = [None]
    return states

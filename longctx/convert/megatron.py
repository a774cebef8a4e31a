"""Weights of the built-in model from checkpoints of Megatron-Core, and back.

Both are folders of torch.distributed.checkpoint, which need neither Megatron nor a GPU to be read and written: tensors
are taken and made piece by piece, one after the other (`longctx.convert.row_table`). What a checkpoint has beside the
model, an optimizer or a state of chance, is passed over.
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

from longctx.checkpoint.lazy_tensors import LazyTensor, write_lazy
from longctx.checkpoint.save import TRAINER, check_format, differences, list_checkpoints, read_state
from longctx.checkpoint.storage import Reader, RegionPlanner, read_tensors
from longctx.checkpoint.weights import described, find_weights, known, with_defaults, write_weights
from longctx.convert.megatron_table import (
    ATTENTION,
    LINEARS,
    NORMS,
    WHOLE,
    Layer,
    columns,
    has_own_attention,
    layer_prefix,
    part,
    table,
)
from longctx.convert.row_table import Blocks, Whole, at_once, made
from longctx.data.staging import naming_disk_errors, staging
from longctx.errors import UserError
from longctx.files import sync
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig

_LATEST = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
"""What Megatron calls a checkpoint of weights alone."""
_BESIDE = ("optimizer.", "chained_", "rng_state", "rerun_state_machine")
"""What names of what is not the model begin with."""
_STACKED = "decoder.layers."


@dataclass(frozen=True)
class Converted:
    """What was written."""

    parameters: int
    source: Path
    model: ModelConfig


class _Checkpoint:
    """Megatron's tensors in a folder, each by a name with its layer's number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = Reader(folder)
        try:
            entries = self._reader.read_metadata().state_dict_metadata
        except Exception as error:  # what pickle makes of damaged bytes is any of them
            raise UserError(
                f"{folder} cannot be read: .metadata: {error}. Give another checkpoint as SOURCE"
            ) from error
        self._stored = {
            name: entry.size
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith(_BESIDE)
        }
        self.shapes = {name: shape for name, shape, _ in self._named()}
        self._places = {name: place for name, _, place in self._named()}
        self._joined: dict[str, list[str]] = {}

    def _named(self) -> Iterator[tuple[str, torch.Size, tuple[str, int | None]]]:
        for name, shape in self._stored.items():
            rest = name.removeprefix(_STACKED)
            if not name.startswith(_STACKED) or rest.partition(".")[0].isdigit():
                yield name, shape, (name, None)
            else:
                for number in range(shape[0]):
                    yield layer_prefix(number) + rest, shape[1:], (name, number)

    def join(self, side_by_side: Mapping[str, tuple[int, ...]]) -> None:
        """Take tensors that lie side by side as one, where all of them are there."""
        for name, widths in side_by_side.items():
            parts = [part(name, number) for number in range(len(widths))]
            shapes = [self.shapes.get(each) for each in parts]
            if all(shape is not None and shape[1:] == (width,) for shape, width in zip(shapes, widths, strict=True)):
                self.shapes[name] = torch.Size([self.shapes[parts[0]][0], sum(widths)])
                self._joined[name] = parts
                for each in parts:
                    del self.shapes[each]

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """As `longctx.convert.row_table.Read` says."""
        if name in self._joined:
            return torch.cat([self._rows(each, begin, end) for each in self._joined[name]], dim=1)
        return self._rows(name, begin, end)

    def _rows(self, name: str, begin: int, end: int) -> Tensor:
        stored, layer = self._places[name]
        shape = self._stored[stored] if layer is None else self._stored[stored][1:]
        # Parameters of more than two dims are read whole: their rows are those of all but the last.
        direct = len(shape) <= 2
        sizes = (end - begin, *shape[1:]) if direct else tuple(shape)
        offsets = (begin if direct else 0, *[0] * (len(shape) - 1))
        if layer is not None:
            sizes, offsets = (1, *sizes), (layer, *offsets)
        out = torch.empty(sizes)
        read_tensors(self.folder, {stored: out}, self._reader, RegionPlanner(*offsets))
        out = out if layer is None else out[0]
        return out if direct else out.reshape(-1, shape[-1])[begin:end]

    def layer(self, number: int) -> Layer:
        """How the tensors of a layer are called."""
        prefix = layer_prefix(number)
        norms = {}
        for ours, names in NORMS.items():
            norms[ours] = next((name for name in names if prefix + name in self.shapes), names[0])
        return Layer(f"{prefix}{ATTENTION[0]}.weight" in self.shapes, norms)


def find_checkpoint(source: Path) -> Path:
    """The folder of tensors in `source`: that itself, the newest of a directory of Megatron's, which has
    `latest_checkpointed_iteration.txt`, or of a run of `engine = "megatron"`. Raises UserError where there is none."""
    if (source / _LATEST).is_file():
        latest = (source / _LATEST).read_text(encoding="utf-8").strip()
        if latest != _RELEASE and not latest.isdigit():
            raise UserError(f"{source / _LATEST}: {latest!r} is no iteration, and not '{_RELEASE}'")
        source = source / (latest if latest == _RELEASE else f"iter_{int(latest):07d}")
    elif there := list_checkpoints(source / "checkpoints"):
        source = there[-1]
    if not (source / ".metadata").is_file():
        raise UserError(
            f"{source} has no .metadata: give a checkpoint in Megatron's format torch_dist as SOURCE, the directory "
            f"that has its {_LATEST}, or a run of engine = 'megatron'"
        )
    return source


def from_megatron(source: Path, model: ModelConfig | None, out: Path) -> Converted:
    """Write the weights of a checkpoint of Megatron's, float32, into the new directory `out`.

    `model` is the model that they are of; None where the checkpoint is one of engine = "megatron", which says it.
    Raises UserError, before anything is written, where tensors of the model are missing, are of other shapes, or have
    no place in it, and where `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    path = find_checkpoint(source)
    there = _Checkpoint(path)
    rows = there.shapes.get(WHOLE["embedding.weight"], torch.Size([0]))[0]
    model = _said(path, model)
    if model.vocab_size not in (None, rows):
        raise UserError(
            f"model.vocab_size: {model.vocab_size} in the recipe, and {path} has {rows} rows: give model.vocab_size="
            f"{rows}"
        )
    _check_kind(model)
    if any(there.layer(number).own_attention for number in range(model.depth)):
        _check_attention(model)
    found = table(model, rows, there.layer)
    there.join(columns(model))
    _check(there, found.theirs)
    tensors = {name: made(whole, there.rows) for name, whole in found.ours.items()}
    origin = {"command": "longctx convert from-megatron", "source": str(path.resolve())}
    final = out.expanduser().resolve()
    with staging(final) as folder, naming_disk_errors(final):
        write_weights(folder, tensors, described(model, rows), origin)
    return Converted(sum(whole.shape.numel() for whole in found.ours.values()), path, model)


def _said(path: Path, given: ModelConfig | None) -> ModelConfig:
    """The model that a checkpoint is of: what it says itself, or what is given. Raises UserError where these differ,
    where nobody says it, and where a checkpoint that does is damaged or not Megatron's."""
    if not (path / TRAINER).is_file():
        if given is None:
            raise UserError(f"{path} does not say what model it is of: give a recipe that does, --to RECIPE")
        return given
    state = read_state(path, "as SOURCE")
    check_format(path, state, "megatron", "Its tensors are the built-in model's already: give it to train.init")
    said = known(path, state.model)
    if given is not None:
        found = differences(with_defaults(state.model), described(given, said.vocab_size or 0))
        if found:
            raise UserError(f"{path} is of another model than the recipe's: {'; '.join(found)}. Leave out --to")
    return said


def _check_kind(model: ModelConfig) -> None:
    """Raise UserError, naming every key, for a model that Megatron's layers are not."""
    found = []
    if set(model.feed_forwards) != {SwigluConfig.name}:
        found.append("model.ffn: Megatron's dense feed-forwards are 'swiglu'; others are not converted")
    if model.block != "sequential" or model.residual is not None:
        found.append("model.block, model.residual: Megatron's blocks are sequential, without factors")
    if model.norm != "rms":
        found.append("model.norm: norms 'rms' are converted")
    if found:
        raise UserError("\n".join(found))


def _check(there: _Checkpoint, wanted: Mapping[str, Whole]) -> None:
    mistakes, beside = [], tuple(name for names in NORMS.values() for name in names)
    for name, whole in wanted.items():
        if name not in there.shapes:
            mistakes.append(f"{name} {list(whole.shape)} is missing")
        elif there.shapes[name].numel() != whole.shape.numel() or there.shapes[name][-1] != whole.shape[-1]:
            mistakes.append(f"{name} is {list(there.shapes[name])}: expected {list(whole.shape)}")
    mistakes += [
        f"{name} {list(shape)} has no place in the model"
        for name, shape in there.shapes.items()
        if name not in wanted and not name.endswith(beside)
    ]
    if mistakes:
        raise UserError("\n".join([f"{there.folder} does not have the tensors of the model:", *sorted(mistakes)]))


def to_megatron(source: Path, out: Path) -> Converted:
    """Write a checkpoint of weights for Megatron-Core's script (`--load`) into the new directory `out`.

    Softmax layers become Megatron's own attention; other layers, and mixtures of heads, the mixers of
    `longctx.adapters.megatron.specs` (`longctx.convert.megatron_script`). `source` is a checkpoint, a run's directory
    (its newest one is taken), or what `longctx convert` wrote. Raises UserError, before anything is written, for a
    model that Megatron's layers are not, and where `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    weights = find_weights(source, "as SOURCE")
    model, rows = weights.whole_model()
    _check_kind(model)
    _check_attention(model)
    found = table(model, rows, lambda number: _written(model, number))
    read = Blocks(weights).rows
    each = {name: made(whole, read) for name, whole in found.theirs.items()}
    for name, widths in columns(model).items():
        each |= _side_by_side(name, each.pop(name), widths)
    each |= _norms_by_themselves(model, each)
    alike = len(set(model.pattern)) == 1 and model.mixer(0).same_in_all_layers
    final = out.expanduser().resolve()
    with staging(final) as folder, naming_disk_errors(final):
        release = folder / _RELEASE
        release.mkdir()
        write_lazy(release, _stacked(model, each) if alike else each, _extra_states(model, alike))
        sizes = dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size"), 1)
        common = {"args": argparse.Namespace(**sizes), "checkpoint_version": 3.0, "iteration": 0}
        torch.save(common, release / "common.pt")
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (release / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")
        (folder / _LATEST).write_text(_RELEASE, encoding="utf-8")
        for file in (*release.iterdir(), folder / _LATEST):
            sync(file)
    return Converted(sum(whole.shape.numel() for whole in found.ours.values()), weights.path, model)


def _check_attention(model: ModelConfig) -> None:
    """Raise UserError for a softmax layer with parameters that Megatron's attention has not, or has otherwise."""
    config: SoftmaxConfig | None = getattr(model, SoftmaxConfig.name)
    own = any(has_own_attention(model, number) for number in range(model.depth))
    if own and config is not None and (config.qk_norm is not None or config.output_gate):
        raise UserError(
            "model.softmax: norms of queries and keys (qk_norm) and an output gate (output_gate) are not converted to "
            "Megatron's own attention, or from it"
        )


def _written(model: ModelConfig, number: int) -> Layer:
    return Layer(has_own_attention(model, number), {ours: names[0] for ours, names in NORMS.items()})


def _side_by_side(name: str, whole: LazyTensor, widths: Sequence[int]) -> dict[str, LazyTensor]:
    """The columns of a tensor as several."""
    found, begin = {}, 0
    for number, width in enumerate(widths):
        at = slice(begin, begin + width)
        make = partial(_columns_of, whole, at)
        found[part(name, number)] = LazyTensor(torch.Size([whole.shape[0], width]), make, whole.rows)
        begin += width
    return found


def _columns_of(whole: LazyTensor, at: slice, begin: int, end: int) -> Tensor:
    return whole.make(begin, end)[:, at]


def _norms_by_themselves(model: ModelConfig, each: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Before a mixer a norm has one name with Megatron's local layers and another with TransformerEngine's: both."""
    first, other = NORMS["mixer_norm.weight"]
    return {
        layer_prefix(number) + other: each[layer_prefix(number) + first]
        for number in range(model.depth)
        if not has_own_attention(model, number)
    }


def _stacked(model: ModelConfig, each: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors of layers that are all alike, as one for all layers."""
    found = {name: made for name, made in each.items() if not name.startswith(_STACKED)}
    for name, one in each.items():
        if name.startswith(layer_prefix(0)):
            rest = name.removeprefix(layer_prefix(0))
            layers = [each[layer_prefix(number) + rest] for number in range(model.depth)]
            shape = torch.Size([model.depth, *one.shape])
            found[_STACKED + rest] = LazyTensor(shape, _stack(layers), rows=at_once(shape))
    return found


def _stack(layers: list[LazyTensor]) -> Callable[[int, int], Tensor]:
    return lambda begin, end: torch.stack([layer.make(0, layer.shape[0]) for layer in layers[begin:end]])


def _extra_states(model: ModelConfig, alike: bool) -> dict[str, Any]:
    """What Megatron reads beside tensors: of every linear layer a list of its states, of which there is one, empty."""
    found: dict[str, Any] = {}
    for number in range(model.depth):
        for linear in (*LINEARS, *(ATTENTION if has_own_attention(model, number) else ())):
            prefix, shard = layer_prefix(number), "shard_0_1"
            if alike:
                prefix, shard = _STACKED, f"shard_{number}_{model.depth}"
            found[f"{prefix}{linear}._extra_state/{shard}"] = [None]
    return found

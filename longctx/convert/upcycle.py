"""Upcycling: a routed model from trained dense models. `longctx.moe.upcycle` defines the initial value per parameter.

Tensors are materialised one after the other as they are written, those of experts in buffers of at most `BUFFER_BYTES`
(at least one expert). In memory are one buffer, one source tensor and, for means, their sum in float64, so that the
mean of equal sources is bit-identical to them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.checkpoint.compare_models import differences
from longctx.checkpoint.lazy_tensors import LazyTensor
from longctx.checkpoint.weights import (
    Weights,
    find_weights,
    shape_differences,
    shapes_of,
    stored_config,
    write_weights,
)
from longctx.convert.row_table import BUFFER_BYTES
from longctx.data.staging import naming_disk_errors, staging
from longctx.errors import UserError
from longctx.files import absolute
from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.initialise import initial_value
from longctx.model.moe import MoeConfig
from longctx.moe.attention_upcycle import upcycle_out, upcycle_qkv
from longctx.moe.upcycle import (
    AttentionExperts,
    ExpertCopies,
    Mean,
    RandomInit,
    TensorInit,
    Zeros,
    source_of,
    tensor_init,
)
from longctx.recipe import Recipe

_HOW = "as SOURCE"
_ROUTING_KEYS = ("ffn", "swiglu", "moe", "heads", "softmax", "attention_experts", "vocab_size")
"""Keys of `[model]` in which a dense model and a routed one may differ."""


@dataclass(frozen=True)
class Upcycled:
    """Summary of an upcycling."""

    parameters: int
    sources: list[Path]
    notes: list[str]
    """Notes on the initial output of the model, one line each."""


def upcycle(sources: Sequence[Path], recipe: Recipe, out: Path) -> Upcycled:
    """Write weights of `recipe.model`, initialised from dense sources, into the new directory `out`.

    A source is a checkpoint, a run's directory (its latest checkpoint), or the output of `longctx convert`. Random
    tensors use the recipe's seed. Raises UserError, before anything is written, if sources are damaged, differ in their
    model, or do not fit the recipe's model, or if `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} already exists: choose another --out")
    if not sources:
        raise UserError("no SOURCE: name at least one checkpoint or run directory")
    weights = [find_weights(path, _HOW) for path in sources]
    for each in weights:
        each.verify_content()
    plan = _Plan(weights, recipe.model, recipe.seed)
    origin = {
        "command": "longctx convert upcycle",
        "sources": [{"path": str(source.path.resolve()), "step": source.step} for source in weights],
        "recipe": recipe.name,
        "seed": recipe.seed,
    }
    path = absolute(out)
    with staging(path) as folder, naming_disk_errors(path):
        write_weights(folder, plan.tensors(), stored_config(recipe.model, plan.vocab_size), origin)
    return Upcycled(
        sum(shape.numel() for shape in plan.shapes.values()), [source.path for source in weights], plan.notes()
    )


class _Plan:
    """The checked initial value of every tensor of the routed model."""

    def __init__(self, sources: Sequence[Weights], config: ModelConfig, seed: int) -> None:
        self._sources, self._config, self._seed = sources, config, seed
        _check_one_model(sources)
        first = sources[0]
        self.vocab_size = int(first.model["vocab_size"])
        _check_config(first, config, self.vocab_size)
        self.shapes = shapes_of(config, self.vocab_size)
        self._inits = _tensor_inits(first, config, self.shapes)
        with torch.device("meta"):
            self._model = Decoder(config, self.vocab_size)

    def tensors(self) -> dict[str, LazyTensor]:
        """Return the tensors, by name."""
        return {name: self._lazy_tensor(name, init) for name, init in self._inits.items()}

    def _lazy_tensor(self, name: str, init: TensorInit) -> LazyTensor:
        shape = self.shapes[name]
        match init:
            case Mean():
                return LazyTensor(shape, lambda begin, end: self._mean(init))
            case ExpertCopies():
                expert_bytes = 4 * shape[1:].numel()
                rows = max(1, BUFFER_BYTES // expert_bytes)
                return LazyTensor(shape, partial(self._expert_copies, init), rows=rows)
            case AttentionExperts():
                return LazyTensor(shape, lambda begin, end: self._attention_experts(init))
            case RandomInit():
                return LazyTensor(shape, lambda begin, end: initial_value(self._model, name, self._seed))
            case Zeros():
                return LazyTensor(shape, lambda begin, end: torch.zeros(shape))

    def _mean(self, init: Mean) -> Tensor:
        if len(self._sources) == 1:
            return self._sources[0].read(init.name).mul_(init.factor)
        total = self._sources[0].read(init.name).double()
        for source in self._sources[1:]:
            total += source.read(init.name)
        return total.mul_(init.factor).div_(len(self._sources)).float()

    def _expert_copies(self, init: ExpertCopies, begin: int, end: int) -> Tensor:
        out: Tensor | None = None
        count = len(self._sources)
        for number, source in enumerate(self._sources):
            rows = [expert - begin for expert in range(begin, end) if source_of(expert, count) == number]
            if rows:
                tensor = source.read(init.name)
                out = tensor.new_empty(end - begin, *tensor.shape) if out is None else out
                torch.mul(tensor, init.factor, out=tensor)
                out[rows] = tensor
        assert out is not None
        return out

    def _attention_experts(self, init: AttentionExperts) -> Tensor:
        count = len(self._sources)
        tensors = [source.read(init.name) for source in self._sources]
        experts = range(_attention_experts_config(self._config).experts)
        return _upcycle_function(self._config, init)([tensors[source_of(expert, count)] for expert in experts])

    def notes(self) -> list[str]:
        """Return whether the initial output equals the source's, and why not."""
        moe = self._config.mixture
        notes = [
            f"The initial output differs from the source's: {why}." for why in (_output_changes(moe) if moe else ())
        ]
        if len(self._sources) > 1:
            notes.append(
                "Experts come from several sources, other tensors are means: the initial output equals no source's."
            )
        if self._config.heads is not None:
            notes.append("Active heads initially have weight 1; inactive heads do not contribute to the output.")
        return notes or ["The initial output equals the source's."]


def _output_changes(moe: MoeConfig) -> list[str]:
    """Return the reasons why equal experts together do not output what one of them does."""
    reasons = []
    if not moe.normalize:
        reasons.append("model.moe.normalize = false, so that a token's weights do not sum to 1")
    if moe.scale != 1:
        reasons.append(f"model.moe.scale = {moe.scale} multiplies the experts' output")
    if moe.capacity is not None:
        reasons.append("model.moe.capacity drops tokens in training")
    return reasons


def _check_one_model(sources: Sequence[Weights]) -> None:
    first = sources[0]
    for other in sources[1:]:
        found = differences(other.model, first.model) or shape_differences(other.shapes, first.shapes)
        if found:
            raise UserError(
                f"all sources must be of one model, but {other.path} differs from {first.path}: {'; '.join(found)}"
            )


def _check_config(source: Weights, config: ModelConfig, vocab_size: int) -> None:
    """Raise UserError if the two models differ in keys other than those of routing."""
    if config.vocab_size is not None and config.vocab_size != vocab_size:
        raise UserError(
            f"model.vocab_size: {config.vocab_size} in the recipe, but {source.path} has {vocab_size}: remove the key "
            "or set the same value"
        )
    named = source.model.get("ffn")
    names = {named} if isinstance(named, str) else set(named or ())
    if "moe" in names or source.model.get("heads") is not None:
        raise UserError(f"{source.path} is already routed: use dense models {_HOW}")
    dense, routed = (_without_routing(model) for model in (source.model, config.model_dump(mode="json")))
    found = differences(dense, routed)
    if found:
        raise UserError(
            f"{source.path} does not fit the recipe's [model], which must be equal except for routing: "
            f"{'; '.join(found)}"
        )
    if config.mixture is not None:
        _check_experts(source, config, config.mixture)


def _without_routing(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys in which a dense model and a routed one must agree; attention experts count as softmax layers."""
    kept = {key: value for key, value in model.items() if key not in _ROUTING_KEYS}
    kept["layers"] = model["layers"].replace(AttentionExpertsConfig.letter, SoftmaxConfig.letter)
    for table in (model.get("softmax"), model.get("attention_experts")):
        if table is not None:
            # Keys that attention experts do not have take the defaults of softmax layers.
            fields = SoftmaxConfig.model_fields.items()
            kept |= {f"softmax.{key}": table.get(key, field.default) for key, field in fields}
    return kept


def _attention_experts_config(config: ModelConfig) -> AttentionExpertsConfig:
    table: AttentionExpertsConfig = getattr(config, AttentionExpertsConfig.name)
    return table


def _upcycle_function(config: ModelConfig, init: AttentionExperts) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function that builds the matrix of attention experts from those of softmax layers."""
    table = _attention_experts_config(config)
    function = upcycle_qkv if init.matrix == "qkv" else upcycle_out
    kv_heads = table.kv_heads or table.heads
    return lambda tensors: function(tensors, table.heads, kv_heads, table.kv)


def _check_experts(source: Weights, config: ModelConfig, moe: MoeConfig) -> None:
    for layer, name in enumerate(config.feed_forwards):
        down = source.shapes.get(f"blocks.{layer}.ffn.down.weight")
        if name == MoeConfig.name and down is not None and moe.hidden != down[1]:
            raise UserError(
                f"model.moe.hidden: {moe.hidden} is not the width of the feed-forwards of {source.path}, from which "
                f"experts are copied: set model.moe.hidden={down[1]}"
            )
    if moe.shared > 1:
        raise UserError(
            f"model.moe.shared: {moe.shared} shared experts are one layer of {moe.shared} times the width, which "
            "cannot be copied from a dense feed-forward: set 0 or 1"
        )


def _tensor_inits(source: Weights, config: ModelConfig, routed: Mapping[str, torch.Size]) -> dict[str, TensorInit]:
    """Return the initial value of each tensor of the routed model. Raises UserError that names every tensor without
    one, and every unused tensor of the source."""
    dense = source.shapes
    inits, mistakes, used = {}, [], set()
    for name, shape in routed.items():
        init = tensor_init(name, dense.keys(), routed.keys())
        if init is None:
            mistakes.append(f"{name} {list(shape)} of the recipe's model: {source.path} has no tensor for it")
            continue
        inits[name] = init
        if isinstance(init, Mean | ExpertCopies | AttentionExperts):
            used.add(init.name)
            if _initial_shape(init, dense[init.name], shape, config) != shape:
                mistakes.append(
                    f"{name} {list(shape)} of the recipe's model cannot be initialised from {init.name} "
                    f"{list(dense[init.name])} of {source.path}"
                )
    mistakes += [
        f"{name} {list(shape)} of {source.path}: not used by the recipe's model"
        for name, shape in dense.items()
        if name not in used
    ]
    if mistakes:
        raise UserError("\n".join(["the recipe's model cannot be initialised from the source:", *mistakes]))
    if all(isinstance(init, Mean) for init in inits.values()) and config.heads is None:
        raise UserError(
            "the recipe's model is dense, like its sources: add experts (model.ffn, model.moe), attention experts "
            "(model.layers) or routed heads (model.heads)"
        )
    return inits


def _initial_shape(init: TensorInit, source: torch.Size, routed: torch.Size, config: ModelConfig) -> torch.Size:
    """Return the shape of an initial value from source tensors of shape `source`, for a tensor of shape `routed`."""
    match init:
        case ExpertCopies():
            return torch.Size([routed[0], *source])
        case AttentionExperts():
            tensors = [torch.empty(source, device="meta")] * _attention_experts_config(config).experts
            return _upcycle_function(config, init)(tensors).shape
        case _:
            return source

"""A routed model from trained dense ones: which parameter begins how is said in `longctx.moe.upcycle`.

Tensors are made as they are written, one after the other, and those of experts in pieces of at most `PIECE` bytes (at
least an expert): besides such a piece there is a source's tensor in memory, and where sources are averaged their sum in
float64, so that equal sources give themselves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.checkpoint.lazy_tensors import LazyTensor
from longctx.checkpoint.save import differences
from longctx.checkpoint.weights import Weights, described, find_weights, shape_differences, shapes_of, write_weights
from longctx.data.staging import naming_disk_errors, staging
from longctx.errors import UserError
from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.model.initialise import drawn
from longctx.model.moe import MoeConfig
from longctx.moe.attention_upcycle import upcycled_out, upcycled_qkv
from longctx.moe.upcycle import Beginning, Drawn, Experts, Mean, Spread, Zeros, beginning, source_of
from longctx.recipe import Recipe

PIECE = 2**30
"""Bytes of experts that are in memory at one time."""
_HOW = "as SOURCE"
_OF_ROUTING = ("ffn", "swiglu", "moe", "heads", "softmax", "attention_experts", "vocab_size")
"""Keys of `[model]` in which a dense model and a routed one may differ."""


@dataclass(frozen=True)
class Upcycled:
    """What was written."""

    parameters: int
    sources: list[Path]
    notes: list[str]
    """What a user has to know of the model's output at the start, a line each."""


def upcycle(sources: Sequence[Path], recipe: Recipe, out: Path) -> Upcycled:
    """Write the weights of `recipe.model`, made of those of dense sources, into the new directory `out`.

    A source is a checkpoint, a run's directory (its newest one is taken), or what `longctx convert` wrote. What is
    drawn is drawn by the recipe's seed. Raises UserError, before anything is written, where sources are not whole, not
    of one model, or not what the recipe's model can be made of, and where `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out")
    if not sources:
        raise UserError("give at least one SOURCE: a checkpoint, or a run's directory")
    found = [find_weights(path, _HOW) for path in sources]
    plan = _Plan(found, recipe.model, recipe.seed)
    origin = {
        "command": "longctx convert upcycle",
        "sources": [{"path": str(source.path.resolve()), "step": source.step} for source in found],
        "recipe": recipe.name,
        "seed": recipe.seed,
    }
    path = out.expanduser().resolve()
    with staging(path) as folder, naming_disk_errors(path):
        write_weights(folder, plan.tensors(), described(recipe.model, plan.rows), origin)
    return Upcycled(sum(shape.numel() for shape in plan.shapes.values()), [s.path for s in found], plan.notes())


class _Plan:
    """How every tensor of the routed model begins, once it is known that all do."""

    def __init__(self, sources: Sequence[Weights], config: ModelConfig, seed: int) -> None:
        self._sources, self._config, self._seed = sources, config, seed
        _check_one_model(sources)
        first = sources[0]
        self.rows = int(first.model["vocab_size"])
        _check_config(first, config, self.rows)
        self.shapes = shapes_of(config, self.rows)
        self._how = _beginnings(first, config, self.shapes)
        with torch.device("meta"):
            self._model = Decoder(config, self.rows)

    def tensors(self) -> dict[str, LazyTensor]:
        """How each is made, by name."""
        return {name: self._made(name, how) for name, how in self._how.items()}

    def _made(self, name: str, how: Beginning) -> LazyTensor:
        shape = self.shapes[name]
        match how:
            case Mean():
                return LazyTensor(shape, lambda begin, end: self._mean(how))
            case Spread():
                matrix = 4 * shape[1:].numel()
                return LazyTensor(shape, partial(self._spread, how), rows=max(1, PIECE // matrix))
            case Experts():
                return LazyTensor(shape, lambda begin, end: self._attention_experts(how))
            case Drawn():
                return LazyTensor(shape, lambda begin, end: drawn(self._model, name, self._seed))
            case Zeros():
                return LazyTensor(shape, lambda begin, end: torch.zeros(shape))

    def _mean(self, how: Mean) -> Tensor:
        if len(self._sources) == 1:
            return self._sources[0].read(how.name).mul_(how.factor)
        total = self._sources[0].read(how.name).double()
        for source in self._sources[1:]:
            total += source.read(how.name)
        return total.mul_(how.factor).div_(len(self._sources)).float()

    def _spread(self, how: Spread, begin: int, end: int) -> Tensor:
        out: Tensor | None = None
        count = len(self._sources)
        for number, source in enumerate(self._sources):
            mine = [expert - begin for expert in range(begin, end) if source_of(expert, count) == number]
            if mine:
                tensor = source.read(how.name)
                out = tensor.new_empty(end - begin, *tensor.shape) if out is None else out
                torch.mul(tensor, how.factor, out=tensor)
                out[mine] = tensor
        assert out is not None
        return out

    def _attention_experts(self, how: Experts) -> Tensor:
        count = len(self._sources)
        seeds = [source.read(how.name) for source in self._sources]
        experts = range(_attention_experts(self._config).experts)
        return _arrangement(self._config, how)([seeds[source_of(expert, count)] for expert in experts])

    def notes(self) -> list[str]:
        """Whether the output at the start is that of the sources, and what keeps it from being so."""
        moe = self._config.mixture
        notes = [f"The output at the start is not the source's: {why}." for why in (_changed_by(moe) if moe else ())]
        if len(self._sources) > 1:
            notes.append("Experts are from several sources and all else is their mean: the output is that of none.")
        if self._config.heads is not None:
            notes.append("A head that a token reads counts 1 at the start; those that it does not read are missing.")
        return notes or ["The output at the start is that of the source."]


def _changed_by(moe: MoeConfig) -> list[str]:
    """What keeps equal experts from giving what one of them does."""
    found = []
    if not moe.normalize:
        found.append("model.moe.normalize = false, so that a token's weights do not sum to 1")
    if moe.scale != 1:
        found.append(f"model.moe.scale = {moe.scale} multiplies what experts give")
    if moe.capacity is not None:
        found.append("model.moe.capacity drops choices in training")
    return found


def _check_one_model(sources: Sequence[Weights]) -> None:
    first = sources[0]
    for other in sources[1:]:
        found = differences(first.model, other.model) or shape_differences(first.shapes, other.shapes)
        if found:
            raise UserError(
                f"sources have to be of one model; {first.path} (there) and {other.path} (here) differ: "
                f"{'; '.join(found)}"
            )


def _check_config(source: Weights, config: ModelConfig, rows: int) -> None:
    """Raise UserError where the two models differ in what routing does not change."""
    if config.vocab_size is not None and config.vocab_size != rows:
        raise UserError(
            f"model.vocab_size: {config.vocab_size} in the recipe, and {source.path} has {rows}: leave it out, or give "
            "the same"
        )
    named = source.model.get("ffn")
    names = {named} if isinstance(named, str) else set(named or ())
    if "moe" in names or source.model.get("heads") is not None:
        raise UserError(f"{source.path} is routed already: give dense models {_HOW}")
    there, here = (_beside_routing(model) for model in (source.model, config.model_dump(mode="json")))
    found = differences(there, here)
    if found:
        raise UserError(
            f"the recipe's [model] cannot be made of {source.path}; beside routing the two have to be the same: "
            f"{'; '.join(found)}"
        )
    if config.mixture is not None:
        _check_experts(source, config, config.mixture)


def _beside_routing(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a dense model and a routed one have alike: an attention expert is a softmax layer."""
    kept = {key: value for key, value in model.items() if key not in _OF_ROUTING}
    kept["layers"] = model["layers"].replace(AttentionExpertsConfig.letter, SoftmaxConfig.letter)
    for table in (model.get("softmax"), model.get("attention_experts")):
        if table is not None:
            # What attention experts have no key for is as in a softmax layer that does not say it.
            fields = SoftmaxConfig.model_fields.items()
            kept |= {f"softmax.{key}": table.get(key, field.default) for key, field in fields}
    return kept


def _attention_experts(config: ModelConfig) -> AttentionExpertsConfig:
    table: AttentionExpertsConfig = getattr(config, AttentionExpertsConfig.name)
    return table


def _arrangement(config: ModelConfig, how: Experts) -> Callable[[Sequence[Tensor]], Tensor]:
    """What makes the matrix of attention experts of those of softmax layers."""
    table = _attention_experts(config)
    function = upcycled_qkv if how.matrix == "qkv" else upcycled_out
    kv_heads = table.kv_heads or table.heads
    return lambda seeds: function(seeds, table.heads, kv_heads, table.kv)


def _check_experts(source: Weights, config: ModelConfig, moe: MoeConfig) -> None:
    for layer, name in enumerate(config.feed_forwards):
        down = source.shapes.get(f"blocks.{layer}.ffn.down.weight")
        if name == MoeConfig.name and down is not None and moe.hidden != down[1]:
            raise UserError(
                f"model.moe.hidden: an expert begins as a dense feed-forward, and those of {source.path} are {down[1]} "
                f"wide, not {moe.hidden}: give model.moe.hidden={down[1]}"
            )
    if moe.shared > 1:
        raise UserError(
            f"model.moe.shared: {moe.shared} shared experts are one layer of {moe.shared} times the width, and a dense "
            "feed-forward makes one as wide as itself: give 0 or 1"
        )


def _beginnings(source: Weights, config: ModelConfig, routed: Mapping[str, torch.Size]) -> dict[str, Beginning]:
    """How each tensor of the routed model begins. Raises UserError that names all for which there is no way."""
    dense = source.shapes
    found, mistakes, taken = {}, [], set()
    for name, shape in routed.items():
        how = beginning(name, dense.keys(), routed.keys())
        if how is None:
            mistakes.append(
                f"{name} {list(shape)} of the recipe's model: {source.path} has nothing that it begins with"
            )
            continue
        found[name] = how
        if isinstance(how, Mean | Spread | Experts):
            taken.add(how.name)
            if _made_shape(how, dense[how.name], shape, config) != shape:
                mistakes.append(
                    f"{name} {list(shape)} of the recipe's model would begin with {how.name} "
                    f"{list(dense[how.name])} of {source.path}"
                )
    mistakes += [
        f"{name} {list(shape)} of {source.path}: the recipe's model has no place for it"
        for name, shape in dense.items()
        if name not in taken
    ]
    if mistakes:
        raise UserError("\n".join(["the recipe's model cannot be made of the source:", *mistakes]))
    if all(isinstance(how, Mean) for how in found.values()) and config.heads is None:
        raise UserError(
            "the recipe's model is as dense as its sources: give it experts (model.ffn, model.moe), attention experts "
            "(model.layers) or routed heads (model.heads)"
        )
    return found


def _made_shape(how: Beginning, given: torch.Size, wanted: torch.Size, config: ModelConfig) -> torch.Size:
    """The shape of what is made of tensors of the shape `given`."""
    match how:
        case Spread():
            return torch.Size([wanted[0], *given])
        case Experts():
            seeds = [torch.empty(given, device="meta")] * _attention_experts(config).experts
            return _arrangement(config, how)(seeds).shape
        case _:
            return given

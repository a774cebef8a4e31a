"""What a recipe asks for and the engine that it names does not have."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longctx.data.config import DataConfig
from longctx.mixers import Mixer, MixerConfig
from longctx.mixers.tensor_parallel import obstacle
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.parallel.layout import Layout
from longctx.recipe.sources import Mistake
from longctx.recipe.tables import DeepSpeedConfig, MegatronConfig, ParallelConfig, TrainConfig


def engine_has_it(tables: Mapping[str, Any]) -> Iterator[Mistake]:
    """All mistakes of that kind. A check whose tables are not all there is skipped."""
    engine, parallel = tables.get("engine"), tables.get("parallel")
    if engine is None:
        return
    for name in ("deepspeed", "megatron"):
        if engine != name and tables.get(name) is not None:
            yield Mistake((name,), f"this table is the engine {name!r}'s, and engine is {engine!r}; remove it")
    if engine == "megatron":
        yield from _megatron(tables)
        return
    if parallel is not None:
        for axis in ("tp", "pp"):
            if getattr(parallel, axis) > 1:
                yield Mistake(("parallel", axis), f"engine = {engine!r} has no {axis}; engine = 'megatron' has")
    if engine == "deepspeed":
        yield from _deepspeed(tables)


def _deepspeed(tables: Mapping[str, Any]) -> Iterator[Mistake]:
    parallel: ParallelConfig | None = tables.get("parallel")
    train: TrainConfig | None = tables.get("train")
    stage = (tables.get("deepspeed") or DeepSpeedConfig()).zero_stage
    if parallel is not None:
        if parallel.dp_replicate > 1:
            yield Mistake(
                ("parallel", "dp_replicate"),
                "ZeRO divides what it divides over all ranks: use dp_shard, or engine = 'torch'",
            )
        if parallel.ep > 1:
            yield Mistake(
                ("parallel", "ep"), "engine = 'deepspeed' keeps all experts together; engine = 'torch' divides them"
            )
    if train is not None and train.precision == "bf16" and stage == 0:
        yield Mistake(
            ("deepspeed", "zero_stage"),
            "DeepSpeed adds gradients up in bf16 in stage 0, where train.precision is 'bf16'; take 1, 2 or 3",
        )


def _megatron(tables: Mapping[str, Any]) -> Iterator[Mistake]:
    model: ModelConfig | None = tables.get("model")
    train: TrainConfig | None = tables.get("train")
    parallel: ParallelConfig | None = tables.get("parallel")
    if train is not None and train.ffn_tile != "none":
        yield Mistake(("train", "ffn_tile"), "engine = 'megatron' has Megatron's feed-forwards, which have no tiles")
    options = tables.get("megatron") or MegatronConfig()
    data: DataConfig | None = tables.get("data")
    if parallel is not None and parallel.tp > 1 and options.sequence_parallel:
        yield from _slices(parallel, data)
    if train is not None and train.precision == "bf16" and not options.distributed_optimizer and model is not None:
        yield from _one_dtype(model)
    if parallel is not None:
        if parallel.dp_replicate > 1:
            yield Mistake(
                ("parallel", "dp_replicate"), "engine = 'megatron' has one kind of data parallelism: dp_shard"
            )
        if parallel.pp > 1 and parallel.layout == "balanced":
            yield Mistake(
                ("parallel", "layout"), "a pipeline takes batches of one length, which 'balanced' does not promise"
            )
    if model is None:
        return
    if set(model.feed_forwards) != {SwigluConfig.name}:
        yield Mistake(
            ("model", "ffn"),
            "engine = 'megatron' has dense feed-forwards ('swiglu'); with experts train on the engine 'torch', or "
            "with Megatron's own script (docs/megatron.md)",
        )
    if model.block != "sequential":
        yield Mistake(("model", "block"), f"engine = 'megatron' has sequential blocks, not {model.block!r}")
    if model.residual is not None:
        yield Mistake(("model", "residual"), "engine = 'megatron' adds to the stream without factors")
    if model.norm != "rms":
        yield Mistake(("model", "norm"), f"engine = 'megatron' has norms 'rms', not {model.norm!r}")
    if parallel is not None:
        yield from _divides(model, parallel)


def _slices(parallel: ParallelConfig, data: DataConfig | None) -> Iterator[Mistake]:
    """What Megatron's sequence parallelism cannot cut once more."""
    if parallel.layout == "balanced":
        if parallel.tp > 2:
            yield Mistake(
                ("parallel", "layout"),
                f"'balanced' does not promise a rank a number of tokens that tp = {parallel.tp} divides: take another "
                "layout, or megatron.sequence_parallel = false",
            )
    elif data is not None:
        rows = Layout((0, data.sequence_length), parallel.layout, parallel.cp).local_length
        if rows % parallel.tp:
            yield Mistake(
                ("data", "sequence_length"),
                f"a rank has {rows} tokens of {data.sequence_length}, which {parallel.tp} tensor-parallel ranks do not "
                "divide: give another length, or megatron.sequence_parallel = false",
            )


def _one_dtype(model: ModelConfig) -> Iterator[Mistake]:
    for table, mixer in _mixers(model):
        exact = (layer for layer in mixer.modules() if getattr(layer, "full_precision", False))
        if any(True for layer in exact for _ in layer.parameters()):
            yield Mistake(
                ("megatron", "distributed_optimizer"),
                f"model.{table.name} has parameters in float32 beside those in bf16, which Megatron's other optimizer "
                "cannot save: leave this key out",
            )


def _mixers(model: ModelConfig) -> Iterator[tuple[MixerConfig, Mixer]]:
    """Every kind of mixer in a model, in its last layer, without memory."""
    for letter in dict.fromkeys(model.pattern):
        layer = model.pattern.rindex(letter)
        table = model.mixer(layer)
        with torch.device("meta"):
            yield table, model.build_mixer(layer)


def _divides(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Mistake]:
    """What tensor- and pipeline-parallel ranks cannot divide between them."""
    tp, pp = parallel.tp, parallel.pp
    if model.depth % pp:
        yield Mistake(("parallel", "pp"), f"{model.depth} layers (model.depth) do not divide over {pp} ranks")
    for table, mixer in _mixers(model):
        found = obstacle(mixer, tp)
        if found is not None:
            yield Mistake(("parallel", "tp"), f"model.{table.name}: {found}")
    feed_forward = model.feed_forward(0)
    if isinstance(feed_forward, SwigluConfig) and feed_forward.width(model.dim) % tp:
        yield Mistake(
            ("parallel", "tp"),
            f"the feed-forward is {feed_forward.width(model.dim)} wide, which {tp} ranks do not divide "
            "(model.swiglu.hidden)",
        )

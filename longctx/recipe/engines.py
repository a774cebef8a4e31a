"""Engine checks: options of a recipe that its engine does not support."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from longctx.data.config import DataConfig
from longctx.mixers import Mixer, MixerConfig
from longctx.mixers.tensor_parallel import sharding_problem
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.parallel.layout import Layout
from longctx.recipe.sources import Mistake
from longctx.recipe.tables import DeepSpeedConfig, MegatronConfig, ParallelConfig, SpikeConfig, TrainConfig


def check_engine(tables: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield a mistake per option that the engine does not support. Checks of missing tables are skipped."""
    engine, parallel = tables.get("engine"), tables.get("parallel")
    if engine is None:
        return
    for name in ("deepspeed", "megatron"):
        if engine != name and tables.get(name) is not None:
            yield Mistake((name,), f"this table is for engine = {name!r}, but engine = {engine!r}; remove it")
    if engine != "torch" and parallel is not None and parallel.reproducible != "none":
        yield Mistake(
            ("parallel", "reproducible"), f"engine = {engine!r} does not support virtual ranks; use engine = 'torch'"
        )
    spikes: SpikeConfig | None = tables.get("spikes")
    if engine != "torch" and spikes is not None and spikes.policy == "skip":
        yield Mistake(
            ("spikes", "policy"),
            f"'skip' needs engine = 'torch': with {engine!r} the gradient norm is known only after the parameters have "
            "changed; use 'stop'",
        )
    if engine == "megatron":
        yield from _check_megatron(tables)
        train: TrainConfig | None = tables.get("train")
        if train is not None and train.init_optimizer:
            yield Mistake(
                ("train", "init_optimizer"),
                "engine = 'megatron' reads optimizer states only of its own checkpoints, to resume: use stages",
            )
        return
    if parallel is not None:
        for axis in ("tp", "pp"):
            if getattr(parallel, axis) > 1:
                yield Mistake(
                    ("parallel", axis), f"engine = {engine!r} does not support {axis} above 1; use engine = 'megatron'"
                )
    if engine == "deepspeed":
        yield from _check_deepspeed(tables)


def _check_deepspeed(tables: Mapping[str, Any]) -> Iterator[Mistake]:
    parallel: ParallelConfig | None = tables.get("parallel")
    train: TrainConfig | None = tables.get("train")
    stage = (tables.get("deepspeed") or DeepSpeedConfig()).zero_stage
    if parallel is not None:
        if parallel.dp_replicate > 1:
            yield Mistake(
                ("parallel", "dp_replicate"),
                "ZeRO shards over all ranks: use dp_shard, or engine = 'torch'",
            )
        if parallel.ep > 1:
            yield Mistake(
                ("parallel", "ep"), "engine = 'deepspeed' does not support expert parallelism; use engine = 'torch'"
            )
    if train is not None and train.precision == "bf16" and stage == 0:
        yield Mistake(
            ("deepspeed", "zero_stage"),
            "stage 0 with train.precision = 'bf16' accumulates gradients in bf16; use stage 1, 2 or 3",
        )


def _check_megatron(tables: Mapping[str, Any]) -> Iterator[Mistake]:
    model: ModelConfig | None = tables.get("model")
    train: TrainConfig | None = tables.get("train")
    parallel: ParallelConfig | None = tables.get("parallel")
    if train is not None and train.ffn_tile != "none":
        yield Mistake(("train", "ffn_tile"), "engine = 'megatron' uses Megatron's feed-forwards, which are not tiled")
    options = tables.get("megatron") or MegatronConfig()
    data: DataConfig | None = tables.get("data")
    if parallel is not None and parallel.tp > 1 and options.sequence_parallel:
        yield from _check_sequence_parallel(parallel, data)
    if train is not None and train.precision == "bf16" and not options.distributed_optimizer and model is not None:
        yield from _check_parameter_dtypes(model)
    if parallel is not None:
        if parallel.dp_replicate > 1:
            yield Mistake(("parallel", "dp_replicate"), "engine = 'megatron' has no replicas: use dp_shard")
        if parallel.pp > 1 and parallel.layout == "balanced":
            yield Mistake(
                ("parallel", "layout"),
                "pipeline parallelism needs batches of one length, which 'balanced' does not guarantee",
            )
    if model is None:
        return
    if set(model.feed_forwards) != {SwigluConfig.name}:
        yield Mistake(
            ("model", "ffn"),
            "engine = 'megatron' supports only dense feed-forwards ('swiglu'); train experts with engine = 'torch', or "
            "with Megatron's own script (docs/megatron.md)",
        )
    if model.block != "sequential":
        yield Mistake(("model", "block"), f"engine = 'megatron' supports only 'sequential' blocks, not {model.block!r}")
    if model.residual is not None:
        yield Mistake(("model", "residual"), "engine = 'megatron' has no factors on the residual stream")
    if model.norm != "rms":
        yield Mistake(("model", "norm"), f"engine = 'megatron' supports only norm 'rms', not {model.norm!r}")
    if parallel is not None:
        yield from _check_divisibility(model, parallel)


def _check_sequence_parallel(parallel: ParallelConfig, data: DataConfig | None) -> Iterator[Mistake]:
    """Check that a context-parallel rank's tokens divide over its tensor-parallel ranks."""
    if parallel.layout == "balanced":
        if parallel.tp > 2:
            yield Mistake(
                ("parallel", "layout"),
                f"'balanced' does not guarantee a multiple of tp = {parallel.tp} tokens per rank: use another layout, "
                "or megatron.sequence_parallel = false",
            )
    elif data is not None:
        tokens = Layout((0, data.sequence_length), parallel.layout, parallel.cp).local_length
        if tokens % parallel.tp:
            yield Mistake(
                ("data", "sequence_length"),
                f"a rank has {tokens} of {data.sequence_length} tokens, which is not a multiple of tp = {parallel.tp}: "
                "use another length, or megatron.sequence_parallel = false",
            )


def _check_parameter_dtypes(model: ModelConfig) -> Iterator[Mistake]:
    """Check that all parameters are bf16, as Megatron's optimizer needs without `distributed_optimizer`."""
    for table, mixer in _mixers(model):
        float32 = (layer for layer in mixer.modules() if getattr(layer, "full_precision", False))
        if any(True for layer in float32 for _ in layer.parameters()):
            yield Mistake(
                ("megatron", "distributed_optimizer"),
                f"model.{table.name} has float32 parameters beside bf16 ones, which Megatron cannot save without the "
                "distributed optimizer: remove this key",
            )


def _mixers(model: ModelConfig) -> Iterator[tuple[MixerConfig, Mixer]]:
    """Yield per kind of mixer its config and the mixer of its last layer, on the meta device."""
    for letter in dict.fromkeys(model.pattern):
        layer = model.pattern.rindex(letter)
        table = model.mixer(layer)
        with torch.device("meta"):
            yield table, model.build_mixer(layer)


def _check_divisibility(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Mistake]:
    """Check that layers, heads and channels divide over pipeline- and tensor-parallel ranks."""
    tp, pp = parallel.tp, parallel.pp
    if model.depth % pp:
        yield Mistake(("parallel", "pp"), f"{model.depth} layers (model.depth) are not a multiple of pp = {pp}")
    for table, mixer in _mixers(model):
        reason = sharding_problem(mixer, tp)
        if reason is not None:
            yield Mistake(("parallel", "tp"), f"model.{table.name}: {reason}")
    feed_forward = model.feed_forward(0)
    if isinstance(feed_forward, SwigluConfig) and feed_forward.width(model.dim) % tp:
        yield Mistake(
            ("parallel", "tp"),
            f"the feed-forward width {feed_forward.width(model.dim)} (model.swiglu.hidden) is not a multiple of "
            f"tp = {tp}",
        )

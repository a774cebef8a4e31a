"""Checks across the tables of a recipe: parallel sizes against ranks and model, the LR schedule against steps."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from longctx.model.config import ModelConfig
from longctx.recipe.engines import check_engine
from longctx.recipe.sources import Mistake
from longctx.recipe.tables import LRScheduleConfig, ParallelConfig, TrainConfig


def check_tables(tables: Mapping[str, Any], world_size: int | None) -> list[Mistake]:
    """Return all mistakes across the tables of a recipe, which are given by name.

    Checks of missing tables are skipped, so that a recipe with one invalid table has its other tables checked.
    `world_size` is the number of ranks; if None, checks that depend on it are skipped.
    """
    names = ("train", "schedule", "parallel", "model", "checkpoint")
    train, schedule, parallel, model, checkpoint = map(tables.get, names)
    mistakes: list[Mistake] = list(check_engine(tables))
    if train is not None and schedule is not None:
        mistakes += _check_lr_schedule(train, schedule)
    if parallel is not None:
        mistakes += _check_ulysses(parallel)
        mistakes += _check_reproducible(parallel, world_size)
        mistakes += _check_ranks(parallel, world_size)
    if parallel is not None and model is not None:
        mistakes += _check_attention_schedule(model, parallel)
        mistakes += _check_experts(model, parallel, world_size)
    if train is not None and parallel is not None:
        mistakes += _check_sequences(train, parallel, world_size)
    if checkpoint is not None and checkpoint.keep_best and tables.get("evaluation", True) is None:
        mistakes.append(Mistake(("checkpoint", "keep_best"), "there is no held-out loss without [evaluation]"))
    return mistakes


def _check_lr_schedule(train: TrainConfig, schedule: LRScheduleConfig) -> Iterator[Mistake]:
    decay = schedule.decay or 0
    if schedule.warmup + decay > train.steps:
        total = f"{schedule.warmup} + {decay} = {schedule.warmup + decay}"
        yield Mistake(
            ("schedule", "warmup"),
            f"warmup takes {schedule.warmup} steps, but train.steps is {train.steps}"
            if not decay
            else f"warmup and decay take {total} steps, but train.steps is {train.steps}",
        )


def _check_ulysses(parallel: ParallelConfig) -> Iterator[Mistake]:
    cp, ulysses = parallel.cp, parallel.ulysses
    if cp % ulysses:
        yield Mistake(("parallel", "ulysses"), f"cp = {cp} is not a multiple of ulysses = {ulysses}")
    elif parallel.attention.startswith("ulysses-") and not 1 < ulysses < cp:
        yield Mistake(
            ("parallel", "attention"),
            f"{parallel.attention!r} needs ulysses above 1 and below cp = {cp}, not {ulysses}; use 'ulysses' or "
            f"{parallel.attention.removeprefix('ulysses-')!r} otherwise",
        )


def _check_reproducible(parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    """Check the axes with which virtual ranks compute the same to the bit."""
    ranks, where = parallel.reproducible, ("parallel", "reproducible")
    if ranks == "none":
        return
    if ranks < 2 or ranks.bit_count() != 1:
        yield Mistake(where, f"should be a power of two from 2 on, not {ranks}")
    elif ranks % parallel.cp:
        yield Mistake(where, f"cp = {parallel.cp} does not divide {ranks}")
    dp = None if world_size is None or world_size % parallel.cp else world_size // parallel.cp
    if dp is not None and dp.bit_count() != 1:
        yield Mistake(where, f"needs a power of two of data-parallel ranks, not {dp}")
    for name in ("ulysses", "ep", "tp", "pp"):
        if getattr(parallel, name) > 1:
            yield Mistake(("parallel", name), f"should be 1 with parallel.reproducible, not {getattr(parallel, name)}")
    if parallel.attention.startswith("ulysses-"):
        yield Mistake(
            ("parallel", "attention"), f"{parallel.attention!r} is not one of parallel.reproducible's schedules"
        )


def _check_attention_schedule(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Mistake]:
    """Check that the heads of every layer divide over the ranks among which the schedule exchanges them."""
    two_level = parallel.attention.startswith("ulysses-")
    cp = parallel.cp if parallel.reproducible == "none" else parallel.reproducible
    if cp == 1 or parallel.cp % parallel.ulysses or (two_level and not 1 < parallel.ulysses < parallel.cp):
        return  # nothing is exchanged, or the mistake is already reported
    ranks = cp if parallel.attention == "ulysses" else parallel.ulysses
    for letter in dict.fromkeys(model.pattern):
        layer = model.pattern.index(letter)
        if any(count % parallel.tp for count in model.attention_head_counts(layer).values()):
            continue  # reported by the tensor-parallel check
        field, names = model.available_schedules(layer, cp, parallel.ulysses, parallel.tp)
        if field == "attention" and parallel.attention not in ("auto", *names):
            heads = " and ".join(
                f"{count} {words}" for words, count in model.attention_head_counts(layer, parallel.tp).items()
            )
            yield Mistake(
                ("parallel", "attention"),
                f"{parallel.attention!r} splits heads over {ranks} ranks, but model.{model.mixer(layer).name} has "
                f"{heads} per rank",
            )


def _check_ranks(parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    sizes = {name: getattr(parallel, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")}
    # Axes that only some engines support are named only if they are used.
    sizes = {name: size for name, size in sizes.items() if size != 1 or name not in ("tp", "pp")}
    shard = parallel.dp_shard
    if isinstance(shard, int) and shard < 1:
        yield Mistake(("parallel", "dp_shard"), f"should be greater than 0 or 'rest', not {shard}")
        return
    if world_size is None:
        return
    if shard == "rest":
        del sizes["dp_shard"]
    product = math.prod(sizes.values())
    text = f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} = {product}"
    if isinstance(shard, int):
        if product != world_size:
            yield Mistake(
                ("parallel",),
                f"{text}, but there {_ranks(world_size)}; start {product} (--nproc {product} on one machine), or set "
                "dp_shard = 'rest'",
            )
    elif world_size % product:
        yield Mistake(
            ("parallel",),
            f"{text} does not divide the number of ranks, {world_size}; "
            f"start a multiple of {product} (--nproc {product} on one machine)",
        )


def _check_experts(model: ModelConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    ep, moe = parallel.ep, model.mixture
    if ep == 1:
        return
    if moe is None:
        yield Mistake(("parallel", "ep"), f"ep = {ep}, but no layer of the model has experts (model.ffn)")
        return
    if moe.experts % ep:
        yield Mistake(("parallel", "ep"), f"{moe.experts} experts (model.moe.experts) are not a multiple of ep = {ep}")
    shard = _dp_shard(parallel, world_size)
    if shard is None:
        return
    ranks = shard * parallel.cp
    if ranks % ep:
        yield Mistake(("parallel", "ep"), f"{ep} does not divide dp_shard * cp = {shard} * {parallel.cp} = {ranks}")
        return
    copies = ranks // ep
    for key, width in (("dim", model.dim), ("moe.hidden", moe.hidden)):
        rows = width if key == "dim" else 2 * width
        if rows % copies:
            yield Mistake(
                ("parallel", "ep"),
                f"the {copies} ranks with the same experts (dp_shard * cp / ep) shard their matrices by rows, but "
                f"model.{key} = {width} makes {rows} rows, which is not a multiple of {copies}",
            )


def _dp_shard(parallel: ParallelConfig, world_size: int | None) -> int | None:
    """Return the size of dp_shard; None if it depends on an unknown or unsuitable number of ranks."""
    if isinstance(parallel.dp_shard, int):
        return parallel.dp_shard if parallel.dp_shard > 0 else None
    return None if world_size is None else parallel.shard(world_size)


def _ranks(count: int) -> str:
    return "is 1 rank" if count == 1 else f"are {count} ranks"


def _check_sequences(train: TrainConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    shard = _dp_shard(parallel, world_size)
    if shard is None:
        return
    size = parallel.dp_replicate * shard
    if train.sequences_per_step % size:
        below = train.sequences_per_step // size * size
        multiples = [str(n) for n in (below, below + size) if n > 0]
        yield Mistake(
            ("train", "sequences_per_step"),
            f"{train.sequences_per_step} is not a multiple of the data-parallel size {size} (dp_replicate * dp_shard = "
            f"{parallel.dp_replicate} * {shard}); the nearest multiples: {' and '.join(multiples)}",
        )

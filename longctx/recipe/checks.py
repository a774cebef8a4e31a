"""What no table of a recipe can judge alone: sizes against ranks, steps against the schedule."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from longctx.model.config import ModelConfig
from longctx.recipe.engines import engine_has_it
from longctx.recipe.sources import Mistake
from longctx.recipe.tables import LRScheduleConfig, ParallelConfig, TrainConfig


def judge(tables: Mapping[str, Any], world_size: int | None) -> list[Mistake]:
    """All mistakes between the tables of a recipe, given by name.

    A check whose tables are not all there is skipped, so that a recipe with a wrong table still has the others
    judged. `world_size` is the number of ranks; None where it is not known yet: what depends on it is then skipped.
    """
    train, schedule, parallel, model = (tables.get(name) for name in ("train", "schedule", "parallel", "model"))
    mistakes: list[Mistake] = list(engine_has_it(tables))
    if train is not None and schedule is not None:
        mistakes += _schedule_fits(train, schedule)
    if parallel is not None:
        mistakes += _ulysses_fits(parallel)
        mistakes += _ranks_fit(parallel, world_size)
    if parallel is not None and model is not None:
        mistakes += _schedules_fit(model, parallel)
        mistakes += _experts_divide(model, parallel, world_size)
    if train is not None and parallel is not None:
        mistakes += _sequences_divide(train, parallel, world_size)
    return mistakes


def _schedule_fits(train: TrainConfig, schedule: LRScheduleConfig) -> Iterator[Mistake]:
    decay = schedule.decay or 0
    if schedule.warmup + decay > train.steps:
        total = f"{schedule.warmup} + {decay} = {schedule.warmup + decay}"
        yield Mistake(
            ("schedule", "warmup"),
            f"warmup takes {schedule.warmup} steps and train.steps is {train.steps}"
            if not decay
            else f"warmup and decay together take {total} steps and train.steps is {train.steps}",
        )


def _ulysses_fits(parallel: ParallelConfig) -> Iterator[Mistake]:
    cp, ulysses = parallel.cp, parallel.ulysses
    if cp % ulysses:
        yield Mistake(
            ("parallel", "ulysses"), f"cp = {cp} does not divide into groups of {ulysses}: {cp % ulysses} are left"
        )
    elif parallel.attention.startswith("ulysses-") and not 1 < ulysses < cp:
        yield Mistake(
            ("parallel", "attention"),
            f"{parallel.attention!r} needs ulysses between 1 and cp = {cp}, not {ulysses}; 'ulysses' and "
            f"{parallel.attention.removeprefix('ulysses-')!r} are for one of the two alone",
        )


def _schedules_fit(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Mistake]:
    """Where heads do not divide as the schedule of attention has them change ranks."""
    pairs = parallel.attention.startswith("ulysses-")
    if parallel.cp == 1 or parallel.cp % parallel.ulysses or (pairs and not 1 < parallel.ulysses < parallel.cp):
        return  # nothing travels, or it has been told
    over = parallel.cp if parallel.attention == "ulysses" else parallel.ulysses
    for letter in dict.fromkeys(model.pattern):
        layer = model.pattern.index(letter)
        if any(count % parallel.tp for count in model.attended(layer).values()):
            continue  # told where heads are divided
        field, names = model.available_schedules(layer, parallel.cp, parallel.ulysses, parallel.tp)
        if field == "attention" and parallel.attention not in ("auto", *names):
            has = " and ".join(f"{count} {words}" for words, count in model.attended(layer, parallel.tp).items())
            yield Mistake(
                ("parallel", "attention"),
                f"{parallel.attention!r} divides heads over {over} ranks, and of model.{model.mixer(layer).name} a "
                f"rank has {has}",
            )


def _ranks_fit(parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    sizes = {name: getattr(parallel, name) for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp")}
    # Those that only some engines have are told where they are used.
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
    told = f"{' * '.join(sizes)} = {' * '.join(map(str, sizes.values()))} = {product}"
    if isinstance(shard, int):
        if product != world_size:
            yield Mistake(
                ("parallel",),
                f"{told}, but there {_ranks(world_size)}; start {product} (--nproc {product} on one machine), or write "
                "dp_shard = 'rest'",
            )
    elif world_size % product:
        yield Mistake(
            ("parallel",),
            f"{told} does not divide the number of ranks, {world_size}; "
            f"start a multiple of {product} (--nproc {product} on one machine)",
        )


def _experts_divide(model: ModelConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    ep, moe = parallel.ep, model.mixture
    if ep == 1:
        return
    if moe is None:
        yield Mistake(("parallel", "ep"), f"{ep} ranks for experts, and no layer of the model has any (model.ffn)")
        return
    if moe.experts % ep:
        yield Mistake(("parallel", "ep"), f"{moe.experts} experts (model.moe.experts) do not divide over {ep} ranks")
    shard = _dp_shard(parallel, world_size)
    if shard is None:
        return
    both = shard * parallel.cp
    if both % ep:
        yield Mistake(("parallel", "ep"), f"{ep} does not divide dp_shard * cp = {shard} * {parallel.cp} = {both}")
        return
    rest = both // ep
    for key, width in (("dim", model.dim), ("moe.hidden", moe.hidden)):
        rows = width if key == "dim" else 2 * width
        if rows % rest:
            yield Mistake(
                ("parallel", "ep"),
                f"the {rest} ranks that hold the same experts (dp_shard * cp / ep) share their matrices by rows, and "
                f"model.{key} = {width} gives {rows} rows, which {rest} does not divide",
            )


def _dp_shard(parallel: ParallelConfig, world_size: int | None) -> int | None:
    """The size of dp_shard; None where it hangs on ranks that are not known, or do not fit."""
    if isinstance(parallel.dp_shard, int):
        return parallel.dp_shard if parallel.dp_shard > 0 else None
    return None if world_size is None else parallel.shard(world_size)


def _ranks(count: int) -> str:
    return "is 1 rank" if count == 1 else f"are {count} ranks"


def _sequences_divide(train: TrainConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    shard = _dp_shard(parallel, world_size)
    if shard is None:
        return
    size = parallel.dp_replicate * shard
    if train.sequences_per_step % size:
        below = train.sequences_per_step // size * size
        lengths = [str(n) for n in (below, below + size) if n > 0]
        yield Mistake(
            ("train", "sequences_per_step"),
            f"{train.sequences_per_step} sequences do not divide over {size} data-parallel ranks (dp_replicate * "
            f"dp_shard = {parallel.dp_replicate} * {shard}); nearest that fit: {' and '.join(lengths)}",
        )

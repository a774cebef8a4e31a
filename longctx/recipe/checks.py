"""What no table of a recipe can judge alone: sizes against ranks, steps against the schedule."""

from collections.abc import Iterator, Mapping
from typing import Any

from longctx.recipe.sources import Mistake
from longctx.train.config import ParallelConfig, ScheduleConfig, TrainConfig


def judge(tables: Mapping[str, Any], world_size: int | None) -> list[Mistake]:
    """All mistakes between the tables of a recipe, given by name.

    A check whose tables are not all there is skipped, so that a recipe with a wrong table still has the others
    judged. `world_size` is the number of ranks; None where it is not known yet: what depends on it is then skipped.
    """
    train, schedule, parallel = (tables.get(name) for name in ("train", "schedule", "parallel"))
    mistakes: list[Mistake] = []
    if train is not None and schedule is not None:
        mistakes += _schedule_fits(train, schedule)
    if parallel is not None:
        mistakes += _ulysses_fits(parallel)
        mistakes += _ranks_fit(parallel, world_size)
    if train is not None and parallel is not None:
        mistakes += _sequences_divide(train, parallel, world_size)
    return mistakes


def _schedule_fits(train: TrainConfig, schedule: ScheduleConfig) -> Iterator[Mistake]:
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


def _ranks_fit(parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    replicate, shard, cp = parallel.dp_replicate, parallel.dp_shard, parallel.cp
    if isinstance(shard, int) and shard < 1:
        yield Mistake(("parallel", "dp_shard"), f"should be greater than 0 or 'rest', not {shard}")
        return
    if world_size is None:
        return
    if isinstance(shard, int):
        product = replicate * shard * cp
        if product != world_size:
            yield Mistake(
                ("parallel",),
                f"dp_replicate * dp_shard * cp = {replicate} * {shard} * {cp} = {product}, but there "
                f"{_ranks(world_size)}; start {product} (--nproc {product} on one machine), or write "
                "dp_shard = 'rest'",
            )
    elif world_size % (replicate * cp):
        product = replicate * cp
        yield Mistake(
            ("parallel",),
            f"dp_replicate * cp = {replicate} * {cp} = {product} does not divide the number of ranks, {world_size}; "
            f"start a multiple of {product} (--nproc {product} on one machine)",
        )


def _ranks(count: int) -> str:
    return "is 1 rank" if count == 1 else f"are {count} ranks"


def _sequences_divide(train: TrainConfig, parallel: ParallelConfig, world_size: int | None) -> Iterator[Mistake]:
    shard = parallel.dp_shard
    if not isinstance(shard, int):
        if world_size is None:
            return
        shard = world_size // (parallel.dp_replicate * parallel.cp)
    size = parallel.dp_replicate * shard
    # A size below 1 comes from ranks that do not fit, which is told already.
    if size > 0 and train.sequences_per_step % size:
        below = train.sequences_per_step // size * size
        lengths = [str(n) for n in (below, below + size) if n > 0]
        yield Mistake(
            ("train", "sequences_per_step"),
            f"{train.sequences_per_step} sequences do not divide over {size} data-parallel ranks (dp_replicate * "
            f"dp_shard = {parallel.dp_replicate} * {shard}); nearest that fit: {' and '.join(lengths)}",
        )

"""Stragglers: ranks that are slower than the others, and the rates by which they are found."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from longctx.bench.rates import copy_rate
from longctx.doctor.findings import Finding, few
from longctx.doctor.ranks import gather, no_step
from longctx.hardware_profile import RankRates
from longctx.system import matmul_rate

SLOW, VERY_SLOW = 0.05, 0.25
"""Shares by which a rank is under the median: a warning, and on a GPU wrong."""
ROUNDS, MOST_ROUNDS = 3, 6
SECONDS = 0.3
DTYPES = ("float32", "bfloat16")
_COPY = "copy"

Rates = dict[str, list[float]]
"""Rates of all ranks, in rank order, by name: FLOP/s by dtype, and bytes per second of `copy`."""


def measure_rates(
    device: torch.device,
    rounds: int = ROUNDS,
    most_rounds: int = MOST_ROUNDS,
    seconds: float = SECONDS,
    step: Callable[[], None] = no_step,
) -> list[RankRates]:
    """Measure the rates of all ranks at the same time, and return them in rank order, on each rank. Collective.

    The best of `rounds` counts, each of which takes about `seconds` per rate. As long as a rank is slow there are more
    rounds, up to `most_rounds`: a disturbance passes, a throttled device does not recover. `step` is called before
    each measurement.
    """
    names: dict[str, Callable[[], float]] = {
        name: lambda name=name: matmul_rate(device, getattr(torch, name), seconds)  # type: ignore[misc]
        for name in DTYPES
    }
    names[_COPY] = lambda: copy_rate(device, torch.float32, seconds)
    return to_profile(best_rates(names, rounds, most_rounds, step))


def best_rates(
    measures: Mapping[str, Callable[[], float]], rounds: int, most_rounds: int, step: Callable[[], None] = no_step
) -> Rates:
    """Return the best rates of all ranks, after `rounds`, and up to `most_rounds` while one is slow. Collective."""
    best: Rates = {}
    for number in range(most_rounds):
        if number >= rounds and not any(map(slow_ranks, best.values())):
            break
        for name, measure in measures.items():
            step()
            # The gathers keep the ranks in step, so that they measure under the same load.
            now = gather(measure())
            best[name] = list(map(max, now, best.get(name, now)))
    return best


def to_profile(best: Rates) -> list[RankRates]:
    """Return the rates of ranks, in rank order, as those of a profile."""
    return [
        RankRates(rank=rank, matmul={name: best[name][rank] for name in DTYPES}, copy_rate=copied)
        for rank, copied in enumerate(best[_COPY])
    ]


def slow_ranks(rates: Sequence[float]) -> dict[int, float]:
    """Return the ranks that are more than SLOW under the median, and by which share."""
    median = statistics.median(rates)
    under = {rank: 1 - rate / median for rank, rate in enumerate(rates)}
    return {rank: share for rank, share in under.items() if share > SLOW}


def check_rates(
    name: str, rates: Sequence[float], unit: Callable[[float], str], nodes: Sequence[str], kind: str
) -> Finding:
    """Check the rates of all ranks, in rank order.

    `unit` writes a rate. `nodes`: the name of each rank's node. `kind`: type of the devices. Ranks on CPUs share cores
    and memory with other programs, so that no rate of theirs is wrong.
    """
    median, slow = statistics.median(rates), slow_ranks(rates)
    value = unit(median) if len(rates) == 1 else f"{unit(median)} per rank (median), {unit(min(rates))} the slowest"
    if not slow:
        return Finding(name, value)
    named = [f"rank {rank} on {nodes[rank]} {100 * share:.0f} % under" for rank, share in _slowest_first(slow)]
    return Finding(
        name,
        f"{value}; {few(named)}",
        "wrong" if kind == "cuda" and max(slow.values()) > VERY_SLOW else "warning",
        "all ranks wait for the slowest: look for other processes there (nvidia-smi, top), power or temperature limits "
        "(nvidia-smi -q -d PERFORMANCE), and how threads are pinned; or leave the node out (Slurm: --exclude)",
    )


def _slowest_first(slow: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(slow.items(), key=lambda pair: -pair[1])

"""Link speeds: times of collectives at several sizes, inside nodes and between them."""

from collections.abc import Callable
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.doctor.findings import Finding
from longctx.doctor.ranks import Places, make_groups, no_step
from longctx.doctor.units import duration, rate, size
from longctx.hardware_profile import Collective, CollectiveTimes, Sample, Scope
from longctx.parallel.collectives import all_gather, all_reduce, all_to_all_rows, exchange, reduce_scatter
from longctx.parallel.link_speeds import max_over_ranks, median_seconds

SIZES = {
    "cpu": (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20),
    "cuda": (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20, 256 * 2**20),
}
"""Bytes that each rank contributes, by device type."""
LARGEST_RESULT = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
"""Bytes of an all-gather's result up to which it is measured."""
LONGEST = 0.5
"""Seconds of a call, after which larger ones are left out."""
_FLOAT = 4
_NAMES: dict[Scope, str] = {"node": "inside a node", "between": "between nodes", "all": "all ranks"}


def measure_links(
    places: Places,
    device: torch.device,
    timeout: float,
    sizes: tuple[int, ...] | None = None,
    step: Callable[[], None] = no_step,
) -> list[CollectiveTimes]:
    """Measure each collective in each scope that the ranks have (none for a single rank). Collective.

    `timeout`: seconds per collective. `sizes`: bytes that each rank contributes, ascending; None: those of SIZES.
    `step` is called before each measurement. All ranks return the same times, those of the slowest rank.
    """
    found: list[CollectiveTimes] = []
    for scope, groups in places.groups().items():
        group, ranks = make_groups(groups, timeout), max(map(len, groups))
        measured = sizes or SIZES[device.type]
        found += [_measure(name, scope, group, ranks, device, measured, step) for name in get_args(Collective)]
    return found


def _measure(
    name: Collective,
    scope: Scope,
    group: ProcessGroup | None,
    ranks: int,
    device: torch.device,
    sizes: tuple[int, ...],
    step: Callable[[], None],
) -> CollectiveTimes:
    """Measure one collective over the largest of the groups of a scope, while the others do the same."""
    samples = []
    for wanted in sizes:
        # Each rank gets as many elements, whatever the size of its group.
        elements = ranks * max(1, wanted // (_FLOAT * ranks))
        if name == "all_gather" and ranks * elements * _FLOAT > LARGEST_RESULT[device.type]:
            break
        step()
        own = 0.0
        if group is not None:
            call = collective(name, elements, group, device)
            own = median_seconds(call, device)
        seconds = max_over_ranks(own, None, device)
        samples.append(Sample(bytes=_FLOAT * elements, seconds=seconds))
        if seconds > LONGEST:
            break
    last = samples[-1]
    return CollectiveTimes(
        collective=name,
        scope=scope,
        backend="nccl" if device.type == "cuda" else "gloo",
        ranks=ranks,
        samples=tuple(samples),
        latency=samples[0].seconds,
        bandwidth=received(name, last.bytes, ranks) / last.seconds,
    )


def received(name: Collective, contributed: int, ranks: int) -> float:
    """Return the bytes that a rank receives from `ranks` - 1 others if each contributes `contributed` bytes."""
    return {
        "all_gather": (ranks - 1) * contributed,
        "reduce_scatter": contributed * (ranks - 1) / ranks,
        "all_reduce": 2 * contributed * (ranks - 1) / ranks,
        "all_to_all": contributed * (ranks - 1) / ranks,
        "send_recv": contributed,
    }[name]


def collective(name: Collective, elements: int, group: ProcessGroup, device: torch.device) -> Callable[[], object]:
    """Return a call of a collective over a group, to which each rank contributes `elements` float32 zeros.

    `elements` is rounded down to a multiple of the group's size, and at least that.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    row = max(1, elements // ranks)
    x = torch.zeros(ranks, row, device=device)
    buffer = torch.zeros_like(x)
    rows = [1] * ranks
    following, previous = (rank + 1) % ranks, (rank - 1) % ranks
    calls: dict[Collective, Callable[[], Tensor | None]] = {
        "all_gather": lambda: all_gather(x, group).wait(),
        "reduce_scatter": lambda: reduce_scatter(x, group).wait(),
        "all_reduce": lambda: all_reduce(x, group),
        "all_to_all": lambda: all_to_all_rows(x, rows, rows, group).wait(),
        "send_recv": lambda: exchange({following: x}, {previous: buffer}, group).wait(),
    }
    return calls[name]


def describe_links(links: list[CollectiveTimes]) -> list[Finding]:
    """Return a line for each collective in each scope."""
    return [
        Finding(
            f"{times.collective}, {_NAMES[times.scope]}",
            f"{rate(times.bandwidth)} received per rank at {size(times.samples[-1].bytes)}, "
            f"{duration(times.latency)} at {size(times.samples[0].bytes)} ({times.ranks} ranks, {times.backend})",
        )
        for times in links
    ]

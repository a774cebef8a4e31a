"""Link of each node: messages of pairs of nodes, by which a node with a slow adapter or cable is found."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.doctor.findings import Finding, few
from longctx.doctor.ranks import gather, make_groups, no_step
from longctx.doctor.units import rate
from longctx.parallel.collectives import all_gather, exchange
from longctx.parallel.link_speeds import median_seconds

BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Size of a message by device type."""
SLOW, VERY_SLOW = 0.25, 0.5
"""Shares by which a node is under the median: a warning, and wrong. Networks vary more than devices."""
_FLOAT = 4
_FEWEST = 3


def measure_node_links(
    leaders: Sequence[int],
    device: torch.device,
    timeout: float,
    size: int | None = None,
    step: Callable[[], None] = no_step,
) -> list[float]:
    """Return each node's bytes per second in each direction; empty for fewer than three nodes. Collective.

    Pairs of neighbours among `leaders`, one rank per node, exchange messages of `size` bytes, all pairs at once; then
    each node with its other neighbour. The faster one counts: the slower one is its neighbour's fault. `timeout`:
    seconds per collective. `step` is called before each measurement. Every rank returns the same.
    """
    if len(leaders) < _FEWEST:
        return []
    group, best = make_groups([tuple(leaders)], timeout), 0.0
    step()
    if group is not None:
        own = dist.get_rank(group)
        elements = (size or BYTES[device.type]) // _FLOAT
        x, buffer = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
        for first in (0, 1):
            all_gather(torch.zeros(1, device=device), group).wait()  # all have finished the other round
            other = neighbour(own, first, len(leaders))
            if other is not None:
                seconds = median_seconds(partial(_swap, x, buffer, other, group), device)
                best = max(best, x.nbytes / seconds)
    every = gather(best)
    return [every[rank] for rank in leaders]


def _swap(x: Tensor, buffer: Tensor, other: int, group: ProcessGroup) -> None:
    exchange({other: x}, {other: buffer}, group).wait()


def neighbour(own: int, first: int, count: int) -> int | None:
    """Return the other one of the pair of node `own`, of `count`; pairs begin with node `first`, 0 or 1. None: it is
    left over."""
    place = (own - first) % count
    other = place + 1 if place % 2 == 0 else place - 1
    return (other + first) % count if other < count else None


def check_node_links(rates: Sequence[float], names: Sequence[str]) -> list[Finding]:
    """Check the rates of nodes, by their names; nothing if there are none."""
    if not rates:
        return []
    median = statistics.median(rates)
    value = f"{rate(median)} per direction (median), {rate(min(rates))} the slowest"
    under = {names[number]: 1 - one / median for number, one in enumerate(rates) if one < (1 - SLOW) * median}
    if not under:
        return [Finding("link of each node", value)]
    slowest_first = sorted(under, key=lambda name: -under[name])
    return [
        Finding(
            "link of each node",
            f"{value}; {few(f'{name} {100 * under[name]:.0f} % under' for name in slowest_first)}",
            "wrong" if max(under.values()) > VERY_SLOW else "warning",
            "see the adapter's port and cable there (ibstat, ethtool, dmesg), its place on the switch, other traffic; "
            "or leave the node out (Slurm: --exclude)",
        )
    ]

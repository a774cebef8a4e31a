"""Link and compute speeds of ranks: the inputs of the schedule cost model (`longctx.parallel.attention.cost_model`)."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from longctx.parallel.collectives import all_gather

SMALL, LARGE = 2**8, 2**20
"""Float32 elements of the two messages from which latency and bandwidth are measured."""
REPEATS = 5


@dataclass(frozen=True)
class Speeds:
    """Speeds of one rank: bytes received per second, seconds of latency per message, FLOP/s."""

    bandwidth: float
    latency: float
    flops: float

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:.3g} GB/s received, {1e6 * self.latency:.3g} us per message, "
            f"{self.flops / 1e12:.3g} TFLOP/s per rank"
        )


ASSUMED = Speeds(bandwidth=25e9, latency=20e-6, flops=200e12)
"""Defaults where nothing was measured: one large GPU with its own 200 Gbit/s link per rank."""


def max_over_ranks(value: float, group: ProcessGroup | None, device: torch.device) -> float:
    """Return the largest value of all ranks of a group (None: all ranks), on each of them."""
    own = torch.tensor([value], dtype=torch.float64, device=device)
    return float(all_gather(own, group).wait().max())


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a collective on this rank, with the wait for its result, after a first call."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    # The first call opens connections.
    return statistics.median(times[1:])


def measure_speeds(group: ProcessGroup, device: torch.device, flops: float) -> Speeds:
    """Measure latency and bandwidth with all-gathers over a group; every rank returns the speeds of the slowest.

    `flops`: this rank's FLOP/s. All ranks of the group have to call it.
    """
    size = torch.distributed.get_world_size(group)
    x = torch.zeros(LARGE, device=device)
    small, large = (
        max_over_ranks(
            median_seconds(lambda n=n: all_gather(x[:n], group).wait(), device),  # type: ignore[misc]
            group,
            device,
        )
        for n in (SMALL, LARGE)
    )
    hops = size - 1
    bandwidth = hops * 4 * (LARGE - SMALL) / max(large - small, 1e-9)
    return Speeds(bandwidth, small / hops, -max_over_ranks(-flops, group, device))

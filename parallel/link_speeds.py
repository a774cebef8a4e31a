"""How fast ranks compute and reach each other: what the choice of a schedule reckons with."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.parallel.collectives import all_gather

SMALL, LARGE = 2**8, 2**20
"""Numbers (float32) in the two messages that latency and bandwidth are found from."""
REPEATS = 5


@dataclass(frozen=True)
class Speeds:
    """Of one rank: bytes a second that it receives, seconds until a message is there, operations a second."""

    bandwidth: float
    latency: float
    flops: float

    def __str__(self) -> str:
        return (
            f"{self.bandwidth / 1e9:.3g} GB/s received, {1e6 * self.latency:.3g} us a message, "
            f"{self.flops / 1e12:.3g} TFLOP/s a rank"
        )


ASSUMED = Speeds(bandwidth=25e9, latency=20e-6, flops=200e12)
"""Where nothing was measured: a rank with a large GPU and a 200 Gbit/s link of its own."""


def _slowest(value: float, group: ProcessGroup, device: torch.device) -> float:
    mine = torch.tensor([value], dtype=torch.float64, device=device)
    return float(all_gather(mine, group).wait().max())


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    # The first one makes connections.
    return statistics.median(times[1:])


def measure_speeds(group: ProcessGroup, device: torch.device, flops: float) -> Speeds:
    """Measure all-gathers over a group, which all of its ranks have to call; the same answer on each, of the slowest.

    `flops`: operations a second of this rank.
    """
    size = torch.distributed.get_world_size(group)
    x = torch.zeros(LARGE, device=device)
    small, large = (
        _slowest(_seconds(lambda n=n: all_gather(x[:n], group).wait(), device), group, device)  # type: ignore[misc]
        for n in (SMALL, LARGE)
    )
    hops = size - 1
    bandwidth = hops * 4 * (LARGE - SMALL) / max(large - small, 1e-9)
    return Speeds(bandwidth, small / hops, -_slowest(-flops, group, device))

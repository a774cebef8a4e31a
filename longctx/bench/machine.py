"""What the machine can do at most: the limits that kernels are measured against, in the run that measures them."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from longctx.bench.timing import Clock, median_seconds
from longctx.system import device_name, matmul_rate

BATCHED = ((8, 128), (8, 256), (8, 512), (32, 128))
"""Count and size of the square matrices of the batched products: from the chunks of the recurrences upwards."""
COPIED = 2**28
"""Bytes of the tensor that is copied: many times a processor's caches."""
SECONDS = 0.5
"""For each rate, beside a warm-up."""


@dataclass(frozen=True)
class Machine:
    """A device and its measured rates in one dtype."""

    name: str
    cores: int
    """Physical ones that this process may run on, at most; of the host where the device is a GPU."""
    threads: int
    torch: str
    python: str
    dtype: str
    matmul: float
    """FLOP/s of large square products."""
    batched: dict[str, float]
    """FLOP/s of batched products, by shape."""
    copy: float
    """Bytes read and written each second, together."""

    @property
    def best_batched(self) -> float:
        """The largest rate of batched products."""
        return max(self.batched.values())


def measure_machine(device_type: str, dtype_name: str) -> Machine:
    """Measure the device in this process."""
    device, dtype = torch.device(device_type), getattr(torch, dtype_name)
    physical = psutil.cpu_count(logical=False) or 1
    return Machine(
        name=device_name(device),
        cores=min(physical, len(os.sched_getaffinity(0))),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        dtype=dtype_name,
        matmul=matmul_rate(device, dtype, SECONDS),
        batched={f"{count}x{size}x{size}": batched_rate(device, dtype, count, size) for count, size in BATCHED},
        copy=copy_rate(device, dtype),
    )


def batched_rate(device: torch.device, dtype: torch.dtype, count: int, size: int) -> float:
    """FLOP/s of `count` square products of `size` in one call."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (count, size, size)
    a, b = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * count * size**3 / _seconds(lambda: torch.bmm(a, b, out=out), device)


def copy_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a copy reads and writes, together."""
    source = torch.ones(COPIED // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, timed in groups that are long beside the clock."""
    with torch.inference_mode():
        clock = Clock(device)
        once = median_seconds(call, clock, repeats=3, seconds=SECONDS)
        group = max(1, int(1e-3 / once))

        def several() -> None:
            for _ in range(group):
                call()

        return median_seconds(several, clock, repeats=10**6, seconds=SECONDS) / group


def free_bytes(device_type: str) -> int:
    """Memory that can be had now without taking it from others."""
    if device_type == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    available: int = psutil.virtual_memory().available
    return available

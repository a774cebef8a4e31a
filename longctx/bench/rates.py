"""Machine limits for roofline comparisons: measured rates of products, large, batched and in cache, and of copies."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from longctx.bench.timing import Clock, median_seconds
from longctx.kernels.attention import native
from longctx.kernels.native import library
from longctx.system import device_name, matmul_rate

BATCHED = ((8, 128), (8, 256), (8, 512), (32, 128))
"""Count and size of the square matrices of batched products: from the chunk sizes of the recurrences upwards."""
LARGE = (2048, 4096)
"""Sizes of the square matrices of large products on a CPU."""
IN_CACHE = 2000
"""Products of a timed call in cache: some 50 ms."""
COPIED = 2**28
"""Bytes of the copied tensor: many times the size of any CPU cache."""
SECONDS = 0.5
"""Time per rate, not counting the warm-up."""


@dataclass(frozen=True)
class MachineRates:
    """A device and its measured rates in one dtype."""

    name: str
    cores: int
    """Physical cores that this process may use; of the host if the device is a GPU."""
    threads: int
    torch: str
    python: str
    dtype: str
    device: str
    """"cpu" or "cuda"."""
    matmul: float
    """FLOP/s of large square matmuls."""
    batched: dict[str, float]
    """FLOP/s of batched matmuls, by shape."""
    in_cache: float | None
    """FLOP/s of our C++ kernels' products of matrices in cache; None on a GPU, and where those are not built."""
    copy: float
    """Bytes per second, reads plus writes."""
    native: str
    """Which C++ kernels compute on a CPU, or why none do; empty on a GPU."""

    @property
    def best_batched(self) -> float:
        """The highest rate of batched matmuls."""
        return max(self.batched.values())

    @property
    def limit(self) -> float:
        """The FLOP/s that kernels are compared with: of batched matmuls on a GPU, of the fastest products on a CPU."""
        if self.device == "cuda":
            return self.best_batched
        return max(self.best_batched, self.matmul, self.in_cache or 0.0)


def measure_rates(device_type: str, dtype_name: str) -> MachineRates:
    """Measure the device in this process."""
    device, dtype = torch.device(device_type), getattr(torch, dtype_name)
    physical = psutil.cpu_count(logical=False) or 1
    return MachineRates(
        name=device_name(device),
        cores=min(physical, len(os.sched_getaffinity(0))),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        dtype=dtype_name,
        device=device_type,
        matmul=large_rate(device, dtype),
        batched={f"{count}x{size}x{size}": batched_rate(device, dtype, count, size) for count, size in BATCHED},
        in_cache=in_cache_rate(device, dtype),
        copy=copy_rate(device, dtype),
        native=library.describe() if device_type == "cpu" else "",
    )


def large_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of large square matmuls: on a CPU of the fastest size of `LARGE`."""
    if device.type == "cuda":
        return matmul_rate(device, dtype, SECONDS)
    return max(batched_rate(device, dtype, 1, size) for size in LARGE)


def in_cache_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measure the FLOP/s of our C++ kernels' products in cache; None where there are none."""
    if device.type != "cpu" or dtype not in native.DTYPES or not native.is_built():
        return None
    return (
        native.multiply_in_cache(dtype, 1)
        * IN_CACHE
        / _seconds(lambda: native.multiply_in_cache(dtype, IN_CACHE), device)
    )


def batched_rate(device: torch.device, dtype: torch.dtype, count: int, size: int) -> float:
    """Measure the FLOP/s of a batched matmul of `count` square matrices of `size`, of a plain one for one matrix."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (count, size, size) if count > 1 else (size, size)
    a, b = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * count * size**3 / _seconds(lambda: torch.matmul(a, b, out=out), device)


def copy_rate(device: torch.device, dtype: torch.dtype, seconds: float | None = None) -> float:
    """Measure the bytes per second, reads plus writes, of a copy, for `seconds`; None: SECONDS."""
    source = torch.ones(COPIED // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, seconds)


def _seconds(call: Callable[[], object], device: torch.device, spent: float | None = None) -> float:
    """Measure the median seconds of a call, timed in groups that are long relative to the clock resolution."""
    spent = SECONDS if spent is None else spent
    with torch.inference_mode():
        clock = Clock(device)
        once = median_seconds(call, clock, repeats=3, seconds=spent)
        group = max(1, int(1e-3 / once))

        def several() -> None:
            for _ in range(group):
                call()

        return median_seconds(several, clock, repeats=10**6, seconds=spent) / group

"""System measurements: matmul rate, peak and free memory, and the name of the processor."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

# Larger products are no faster, and the buffers stay small compared with a model.
_LARGEST = {"cpu": 2048, "cuda": 8192}
_SMALLEST = 256


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the FLOP/s of square matrix products in `dtype` on `device`, under the current load.

    Returns the median over repeated products, taken within about `seconds` after a warm-up of at most that length.
    Ranks that share a machine call this at the same time, so that the sum of their rates is the machine's rate.

    `dtype` is a floating-point type. The global random state does not change. On CUDA the peak-memory counter is reset,
    so that `peak_memory_bytes` does not include the buffers used here.
    """
    size = _SMALLEST
    with torch.inference_mode():
        product = _product(size, device, dtype)
        duration = _time(product, device)
        # Use the largest size that allows a dozen products: small ones leave cores and caches partly idle.
        while size < _LARGEST[device.type] and 8 * duration < seconds / 12:
            size *= 2
            product = _product(size, device, dtype)
            duration = _time(product, device)
        end = time.perf_counter() + seconds
        times: list[float] = []
        while len(times) < 3 or time.perf_counter() < end:
            times.append(_time(product, device))
    if device.type == "cuda":
        del product  # the counter restarts from the memory allocated at this point
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / statistics.median(times)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    # Random operands: on a GPU, products of zeros draw less power and run faster than those of training.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> torch.Tensor:
        return torch.mm(a, b, out=out)

    product()  # the first call selects kernels and touches the pages of `out`
    _wait(device)
    return product


def _time(product: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    product()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: resident memory on a CPU, allocated by torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage's peak is inherited across fork and exec, so a small worker of a large launcher would report the
    # launcher's peak; VmHWM, where the kernel reports it, is that of this program.
    high_water = _field(Path("/proc/self/status"), "VmHWM")
    if high_water is not None:
        return int(high_water.removesuffix("kB")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device_type: str) -> int:
    """Return the available memory in bytes: of the host for `cpu`, of the current GPU for `cuda`."""
    if device_type == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    available: int = psutil.virtual_memory().available
    return available


def device_name(device: torch.device) -> str:
    """Return the processor's model, "NVIDIA H100 80GB HBM3" or "AMD EPYC 9654"; its architecture if unnamed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _field(path: Path, name: str) -> str | None:
    """Return the value of the first line `name: value` in a file of `/proc`; None if there is none."""
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None

"""What the machine can do and what a process uses of it: the matmul rate, peak memory, the processor's name."""

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# The rate no longer grows with the size beyond these, and the buffers stay small beside a model's.
_LARGEST = {"cpu": 2048, "cuda": 8192}
_SMALLEST = 256


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of square matrix products in `dtype` on `device`, as this process reaches them now.

    The median of repeated products, within about `seconds` after a warm-up that is at most as long. Ranks that share
    a machine call this at the same time, so that each measures its share and the sum is what they reach together.

    `dtype` is a floating-point one. The global random state is left alone. On CUDA the counter behind
    `peak_memory_bytes` is reset, so that the buffers used here do not count as the model's.
    """
    size = _SMALLEST
    with torch.inference_mode():
        product = _product(size, device, dtype)
        took = _time(product, device)
        # The largest size of which a dozen products fit: small ones leave cores and caches half used.
        while size < _LARGEST[device.type] and 8 * took < seconds / 12:
            size *= 2
            product = _product(size, device, dtype)
            took = _time(product, device)
        end = time.perf_counter() + seconds
        times: list[float] = []
        while len(times) < 3 or time.perf_counter() < end:
            times.append(_time(product, device))
    if device.type == "cuda":
        del product  # the counter restarts from what is allocated now
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / statistics.median(times)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    # Random operands: on a GPU, products of zeros draw less power and run faster than any that training meets.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> torch.Tensor:
        return torch.mm(a, b, out=out)

    product()  # the first call of a size chooses kernels and touches `out`'s pages
    _wait(device)
    return product


def _time(product: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    product()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: resident on a CPU, allocated by torch on a GPU; in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage's peak is inherited across fork and exec, so that a small worker of a large launcher would report the
    # launcher's; VmHWM is this program's own, where the kernel gives it.
    high_water = _field(Path("/proc/self/status"), "VmHWM")
    if high_water is not None:
        return int(high_water.removesuffix("kB")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """The processor's model, "NVIDIA H100 80GB HBM3" or "AMD EPYC 9654"; its architecture where it has no name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _field(path: Path, name: str) -> str | None:
    """The value of the first line `name: value` in a file of `/proc`; None where there is none."""
    if not path.exists():
        return None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None

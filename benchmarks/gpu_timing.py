"""Times, kernels and memory of a call on a GPU, for the steps of the GPU benchmark; on a CPU the same, of the host."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longctx.bench.timing import Clock
from longctx.system import peak_memory_bytes

FLUSHED = 2**28
"""Bytes written before each timed call: more than any L2 cache holds."""
CYCLES_PER_MS = 2_000_000
"""At least: the clock of a GPU is below 2 GHz."""
ROOT = Path(__file__).resolve().parents[1]
SECONDS = 2.0
"""For the repeats of one timing."""
Call = Callable[[], object]


@cache
def _flushed(device: torch.device) -> Tensor:
    return torch.empty(FLUSHED if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)


def synchronize(device: torch.device) -> None:
    """Wait for the device, and so raise what its kernels did wrong."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Call, device: torch.device, repeats: int) -> dict[str, float]:
    """Time a call that ran before: the median `ms`, the spread over `repeats`, `host_ms` and `device_ms`.

    The L2 cache is flushed before each. `ms` begins with nothing in the device's queue, and `host_ms` is until the call
    returns: where both are near, the host is the limit. `device_ms`, on a GPU, is the time with the call queued behind
    others, which is what it adds to a step whose host is ahead.
    """
    clock, hosts = Clock(device), []

    def timed() -> None:
        began = time.perf_counter()
        call()
        hosts.append(1e3 * (time.perf_counter() - began))

    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or sum(times) < 1e3 * SECONDS):
        _flushed(device).zero_()
        times.append(1e3 * clock.seconds(timed))
    result = {
        "ms": statistics.median(times),
        "least_ms": min(times),
        "most_ms": max(times),
        "host_ms": statistics.median(hosts),
    }
    if device.type == "cuda":
        ahead = int(CYCLES_PER_MS * 2 * max(hosts))
        queued = [_behind(call, device, ahead) for _ in range(min(len(times), 5))]
        result["device_ms"] = statistics.median(queued)
    return result


def _behind(call: Call, device: torch.device, cycles: int) -> float:
    """Time a call in ms whose kernels wait in the device's queue, behind one that takes `cycles` of its clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    _flushed(device).zero_()
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def kernels_of(call: Call, device: torch.device, count: int | None = None) -> list[dict[str, Any]]:
    """Profile a call: its kernels (operators on a CPU) with calls and ms, the `count` that take longest in all."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        synchronize(device)
    rows = []
    for event in profiler.key_averages():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key[:100], "calls": event.count, "ms": round(microseconds / 1e3, 4)})
    return sorted(rows, key=lambda row: -row["ms"])[:count]


def host_waits(call: Call, device: torch.device) -> dict[str, int]:
    """Call, and count where the host waits for a GPU, by the line of Python that makes it; empty on a CPU."""
    if device.type != "cuda":
        call()
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = (f"{warning.filename.removeprefix(str(ROOT))}:{warning.lineno}" for warning in found)
    return dict(Counter(lines).most_common())


def peak_mib(call: Call, device: torch.device) -> float:
    """Call, and return the peak memory in MiB, with the inputs; on a CPU that of the process so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return peak_memory_bytes(device) / 2**20


def relative(got: Tensor, want: Tensor) -> float:
    """Compute `|got - want| / |want|` in float64; nan where a value is not finite."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))

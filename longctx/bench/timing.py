"""Timing and memory measurement of a call."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from longctx.system import peak_memory_bytes

_RESET_PEAK = Path("/proc/self/clear_refs")


class Clock:
    """Times calls on a device: with CUDA events, or with the host clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one call, including the wait for the device."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize(self.device)
            return begin.elapsed_time(end) / 1e3
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def repeat(sample: Callable[[], float], first: float, *, repeats: int, seconds: float) -> list[float]:
    """Take up to `repeats` samples after a warm-up sample `first`; all in seconds.

    Takes as many as fit into about `seconds`, including the first. If there is no time for a second one, the first
    counts.
    """
    times: list[float] = []
    spent = longest = first
    while len(times) < repeats and spent + longest <= seconds:
        times.append(sample())
        spent, longest = spent + times[-1], max(longest, times[-1])
    return times or [first]


def median_seconds(call: Callable[[], object], clock: Clock, *, repeats: int, seconds: float) -> float:
    """Measure the median time of a call with `repeat`, after a warm-up call."""

    def sample() -> float:
        return clock.seconds(call)

    return statistics.median(repeat(sample, sample(), repeats=repeats, seconds=seconds))


def memory_taken(call: Callable[[], object], device: torch.device) -> int | None:
    """Measure the peak memory of a call in bytes, beyond what the process holds before it.

    On a CPU, resident memory: glibc returns freed memory, the kernel's peak counter is reset, and the new peak is read
    after the call. None if the counter cannot be reset. On CUDA, memory allocated by torch.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held: int = torch.cuda.memory_allocated(device)
    else:
        # Freed memory that glibc keeps would be reused without showing in the peak.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            _RESET_PEAK.write_text("5", encoding="ascii")  # 5: reset the peak resident set size (proc(5))
        except OSError:
            call()
            return None
        held = psutil.Process().memory_info().rss
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(0, peak_memory_bytes(device) - held)

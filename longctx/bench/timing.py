"""How long a call takes, and how much memory it takes beside what is there."""

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
    """Seconds of a call on a device: by CUDA's events, or by the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object]) -> float:
        """Call it and wait until it is done."""
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
    """Up to `repeats` samples, after one that warmed up and took `first`; all in seconds.

    As many as end within about `seconds`, the first one included. Where there is time for no other, the first one is
    all that there is, and counts.
    """
    times: list[float] = []
    spent = longest = first
    while len(times) < repeats and spent + longest <= seconds:
        times.append(sample())
        spent, longest = spent + times[-1], max(longest, times[-1])
    return times or [first]


def median_seconds(call: Callable[[], object], clock: Clock, *, repeats: int, seconds: float) -> float:
    """The median time of a call, with `repeat`."""

    def sample() -> float:
        return clock.seconds(call)

    return statistics.median(repeat(sample, sample(), repeats=repeats, seconds=seconds))


def memory_taken(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that this process held during the call, beyond those that it held before.

    On a CPU resident memory: glibc gives back what was freed, the system is asked to forget the peak, and the new peak
    is read afterwards. None where the system does not let itself be asked. On CUDA what torch has allocated.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held: int = torch.cuda.memory_allocated(device)
    else:
        # What was freed and is kept would be used again unseen.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            _RESET_PEAK.write_text("5", encoding="ascii")  # 5: the peak of resident memory (proc(5))
        except OSError:
            call()
            return None
        held = psutil.Process().memory_info().rss
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(0, peak_memory_bytes(device) - held)

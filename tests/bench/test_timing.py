"""Memory that a call takes is seen, and runs are counted."""

from pathlib import Path

import pytest
import torch

from longctx.bench import timing
from longctx.bench.timing import Clock, median_seconds, memory_taken, repeat

CPU = torch.device("cpu")
MIB = 2**20
SLACK = MIB
"""Linux counts pages in batches for each thread."""


def allocate(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


def test_a_known_allocation_is_seen() -> None:
    kept: list[torch.Tensor] = []
    taken = memory_taken(lambda: kept.append(allocate(96)), CPU)
    assert taken is not None
    assert 96 * MIB - SLACK <= taken < 112 * MIB


def test_a_peak_is_seen_after_it_is_over() -> None:
    def call() -> None:
        a = allocate(64)
        b = a + 1
        del a, b
        allocate(16)

    taken = memory_taken(call, CPU)
    assert taken is not None
    assert 128 * MIB - SLACK <= taken < 144 * MIB


def test_what_is_there_before_does_not_count() -> None:
    kept = allocate(128)
    taken = memory_taken(lambda: kept.mul_(2), CPU)
    assert taken is not None
    assert taken < 16 * MIB


def test_what_was_freed_before_does_not_hide_anything() -> None:
    """Small blocks come from a heap that keeps them when they are freed."""
    blocks = [torch.ones(MIB // 64) for _ in range(1024)]  # 64 MiB
    pinned = torch.ones(8)  # behind them on the heap
    del blocks
    kept: list[torch.Tensor] = []
    taken = memory_taken(lambda: kept.extend(torch.ones(MIB // 64) for _ in range(1024)), CPU)
    assert taken is not None
    assert pinned.sum() == 8
    assert 60 * MIB <= taken < 80 * MIB


def test_no_figure_where_the_system_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "_RESET_PEAK", tmp_path / "nowhere" / "clear_refs")
    called: list[bool] = []
    assert memory_taken(lambda: called.append(True), CPU) is None
    assert called == [True]


@pytest.mark.parametrize(
    ("first", "repeats", "seconds", "runs"),
    [
        (1.0, 5, 100.0, 5),
        (1.0, 5, 3.5, 2),  # 1 to warm up, 2 more, and no time for another
        (1.0, 5, 1.5, 0),
        (70.0, 5, 60.0, 0),
        (1.0, 1, 0.0, 0),
    ],
)
def test_runs_end_within_the_time(first: float, repeats: int, seconds: float, runs: int) -> None:
    samples = iter([1.0] * 10)
    times = repeat(lambda: next(samples), first, repeats=repeats, seconds=seconds)
    assert times == ([1.0] * runs or [first]), "the first one counts only where it is alone"


def test_the_longest_run_says_whether_there_is_time_for_another() -> None:
    samples = iter([1.0, 5.0, 1.0])
    assert repeat(lambda: next(samples), 1.0, repeats=9, seconds=9.0) == [1.0, 5.0]


def test_the_median_is_that_of_the_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 3.0, 2.0])
    monkeypatch.setattr(Clock, "seconds", lambda self, call: next(seconds))
    assert median_seconds(lambda: None, Clock(CPU), repeats=3, seconds=100.0) == 2.0


def test_the_clock_waits_for_the_call() -> None:
    called: list[bool] = []
    assert Clock(CPU).seconds(lambda: called.append(True)) >= 0
    assert called == [True]

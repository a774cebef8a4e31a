"""A rank's monitor: what it reports while the main thread computes, communicates and ends, and its stacks."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from longctx.health.beat import FOLDER, Beat, FolderBoard
from longctx.health.monitor import monitored
from longctx.parallel.collectives import all_gather, all_reduce
from longctx.parallel.traffic import layer

TIMEOUT = 30.0


def until(find: Callable[[], Any]) -> Any:
    """What is found, as soon as it is."""
    end = time.monotonic() + 20
    while not (found := find()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
    return found


def report_of(folder: Path, rank: int, wanted: Callable[[Beat], object]) -> Beat:
    def find() -> Beat | None:
        return next((beat for beat in FolderBoard(folder).read([rank]).values() if wanted(beat)), None)

    found = until(find)
    assert isinstance(found, Beat)
    return found


def on_ranks(folder: Path, function: Callable[[Path, Any], object]) -> object:
    """On a rank: run `function` with a monitor that reports into `folder`."""
    with patch.dict(os.environ, {FOLDER: str(folder)}), monitored(TIMEOUT, folder) as monitor:
        return function(folder, monitor)


def late_to_all_reduce(folder: Path, monitor: Any) -> object:
    seen = None
    if dist.get_rank() == 1:
        seen = report_of(folder, 0, lambda beat: beat.collective and beat.waited > 0.1)
    with layer("blocks.3"):
        all_reduce(torch.ones(5))
    return seen


def late_to_all_gather(folder: Path, monitor: Any) -> object:
    seen = None
    with layer("blocks.3"):
        if dist.get_rank() == 1:
            seen = report_of(folder, 0, lambda beat: beat.collective and beat.waited > 0.1)
        all_gather(torch.ones(5)).wait()
    return seen


def late_to_barrier(folder: Path, monitor: Any) -> object:
    seen = None
    if dist.get_rank() == 1:
        seen = report_of(folder, 0, lambda beat: beat.collective)
    dist.barrier()
    return seen


@pytest.mark.parametrize(
    ("function", "collective"),
    [
        (late_to_all_reduce, "layer blocks.3, all_reduce of [5] float32 over 2 ranks"),
        (late_to_all_gather, "layer blocks.3, all_gather of [5] float32 over 2 ranks"),
        (late_to_barrier, "barrier, called at longctx.parallel.local_ranks:"),
    ],
)
def test_a_rank_that_waits_says_in_which_collective(ranks, tmp_path: Path, function, collective: str) -> None:
    _, beat = ranks.run(on_ranks, tmp_path, function, size=2)
    assert beat.collective.startswith(collective)
    assert beat.phase == "at the start"
    assert (beat.limit, beat.patience) == (27.0, 15.0)


def wait_for_rank_1(folder: Path, monitor: Any) -> float:
    """Ten rounds in which rank 1 computes and rank 0 waits for it."""
    dist.barrier()
    until(lambda: monitor.waited() >= 0)
    for _ in range(10):
        end = time.monotonic() + 0.25
        while dist.get_rank() == 1 and time.monotonic() < end:
            sum(range(1000))
        all_reduce(torch.ones(5))
    return float(monitor.waited())


def test_the_share_of_waiting_is_that_of_the_rank_that_waits(ranks, tmp_path: Path) -> None:
    first, second = ranks.run(on_ranks, tmp_path, wait_for_rank_1, size=2)
    assert 0 <= second < first <= 1
    assert first > 0.5


def enter_phases(folder: Path, monitor: Any) -> list[tuple[str, bool, float]]:
    found = []
    for step in range(1, 4):
        monitor.enter("step", f"step {step}")
        beat = report_of(folder, 0, lambda beat, step=step: beat.phase == f"step {step}")
        found.append((beat.phase, beat.elapsed < TIMEOUT, beat.limit))
    return found


def test_phases_are_reported_with_their_limits(ranks, tmp_path: Path) -> None:
    (found,) = ranks.run(on_ranks, tmp_path, enter_phases, size=1)
    assert found == [(f"step {step}", True, 27.0) for step in range(1, 4)]
    assert FolderBoard(tmp_path).read([0])[0].phase == "", "its end"


def declare_a_hang(folder: Path, monitor: Any) -> str:
    dist.barrier()
    FolderBoard(folder).declare_hang()
    stacks = folder / f"rank-{dist.get_rank()}.stacks"
    return str(until(lambda: "declare_a_hang" in (text := stacks.read_text() if stacks.exists() else "") and text))


def test_stacks_are_written_once_a_hang_is_declared(ranks, tmp_path: Path) -> None:
    for text in ranks.run(on_ranks, tmp_path, declare_a_hang, size=2):
        assert "in declare_a_hang" in text
        assert "in _report_all" in text


def fails(folder: Path, monitor: Any) -> None:
    raise KeyError


def test_the_end_is_reported_after_an_error_too(ranks, tmp_path: Path) -> None:
    ranks.run(fail, tmp_path, size=2)
    assert [beat.phase for beat in FolderBoard(tmp_path).read(range(2)).values()] == ["", ""]


def fail(folder: Path) -> None:
    with suppress(KeyError):
        on_ranks(folder, fails)

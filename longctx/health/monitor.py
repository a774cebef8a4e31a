"""Monitor of a rank: threads that report heartbeats and, where no launcher watches, end a job that hangs.

On one machine the launcher reads the reports (`longctx.launch.local`). In a job of torchrun or a cluster they are in
the rendezvous store, over a connection of the monitor's own. Rank 0 reads them; other ranks do when they are overdue
and it has not ended the job, or when it is silent.

Another thread looks every 50 ms whether the main thread waits for other ranks: the share of these samples is how much
of its time the rank waited, whatever waits (the layers' collectives, FSDP, a barrier). On CUDA the host does not block
in collectives, but only where it reads a result, so that there is no such share. This thread also ends the process if
the store does not answer, for which the first one may wait for ever.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from longctx.health.beat import FOLDER, STACKS, Beat, Board, FolderBoard
from longctx.health.diagnosis import Watcher, stacks_text
from longctx.health.phase_limits import PhaseLimits
from longctx.health.store_board import StoreBoard
from longctx.parallel.rank_errors import RankError
from longctx.parallel.traffic import communication

_SAMPLE = 0.05
_LEAST_SAMPLES, _MOST_SAMPLES = 40, 20_000
_LONGEST_PATIENCE = 60.0
_PATIENCE_OF_TIMEOUT = 0.5
_REST_OF_TIMEOUT = 0.1
_REPORTS = 6
"""Reports of a rank within the patience of others."""


class Monitor:
    """Reports what this rank's main thread does, from a thread of its own. Made in the main thread."""

    def __init__(self, board: Board | None, timeout: float, stacks: Path) -> None:
        """`board`: where to report, None: nowhere. `timeout`: that of collectives, in seconds. `stacks`: the folder for
        the ranks' stacks when the job hangs."""
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._board, self._stacks = board, stacks / STACKS.format(self._rank)
        self._patience = _patience(timeout)
        self._period = self._patience / _REPORTS
        if board is not None and board.is_watched:  # files of this machine
            self._period = min(self._period, 1.0)
        # A hang is found, and others have reported, before collectives time out.
        self._limits = PhaseLimits(timeout - max(_REST_OF_TIMEOUT * timeout, 3 * self._period))
        self._main = threading.get_ident()
        self._phase = ("start", "at the start", time.monotonic(), self._limits.limit("start"))
        self._waiting: tuple[object, str, float] = (None, "", 0.0)
        """What tells this wait from others, its collective ("" for none), and since when."""
        self._samples: deque[bool] = deque(maxlen=_MOST_SAMPLES)
        """Whether the main thread waited, latest last."""
        self._new_samples = 0
        self._number = 0
        self._answered = time.monotonic()
        """When the board last answered."""
        self._watcher = Watcher()
        self._stacks_are_written = False
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample_all, name="monitor", daemon=True)
        self._reporter = threading.Thread(target=self._report_all, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start to report."""
        self._sampler.start()
        self._reporter.start()

    def enter(self, kind: str, name: str) -> None:
        """Begin a phase, which ends the one before: of a kind whose phases take similar times, such as `step`."""
        now = time.monotonic()
        before, _, began, _ = self._phase
        self._limits.learn(before, now - began)
        self._phase = (kind, name, now, self._limits.limit(kind))

    def waited(self) -> float:
        """Return the share of time, 0 to 1, that the main thread waited for other ranks: since the last call, or over
        the last two seconds if those are more; NaN before the first sample."""
        samples, count = list(self._samples), max(self._new_samples, _LEAST_SAMPLES)
        self._new_samples = 0
        return fmean(samples[-count:]) if samples else float("nan")

    def close(self) -> None:
        """Stop reporting."""
        self._phase = ("", "", time.monotonic(), 0.0)
        self._stop.set()
        self._sampler.join()
        self._reporter.join(self._period)  # not for ever: the store may not answer

    def _sample_all(self) -> None:
        while not self._stop.wait(_SAMPLE):
            self._sample()
            _, phase, began, limit = self._phase
            now = time.monotonic()
            is_watcher = self._board is not None and not self._board.is_watched
            if is_watcher and now - self._answered >= self._patience and now - began > limit:
                self._end(
                    f"{phase}: the rendezvous store at {_store_address()} has not answered for "
                    f"{now - self._answered:.0f} s: the process that holds it, rank 0 or torchrun's first agent, was "
                    "stopped, or its machine does not answer."
                )

    def _report_all(self) -> None:
        if self._board is None:
            return
        while not self._stop.is_set():
            self._report(self._board)
            self._stop.wait(self._period)
        self._report(self._board)  # the end

    def _sample(self) -> None:
        wait, collective = self._current_wait()
        if wait != self._waiting[0]:
            self._waiting = (wait, collective, time.monotonic())
        self._samples.append(bool(collective))
        self._new_samples += 1

    def _current_wait(self) -> tuple[object, str]:
        """Return what tells the main thread's current wait from others, and its collective; "" if it does not wait."""
        current = communication()
        if current is not None:
            layer = f"layer {current.layer}, " if current.layer else ""
            return current, f"{layer}{current.description}"
        frame = _torch_communication(sys._current_frames().get(self._main))
        return (id(frame), f"{frame.f_code.co_name}, called at {_where(frame)}") if frame else (None, "")

    def _beat(self) -> Beat:
        now = time.monotonic()
        _, phase, began, limit = self._phase
        _, collective, since = self._waiting
        self._number += 1
        return Beat(
            number=self._number,
            host=socket.gethostname(),
            pid=os.getpid(),
            phase=phase,
            elapsed=now - began,
            limit=limit,
            patience=self._patience,
            collective=collective,
            waited=now - since if collective else 0.0,
            where=_where(sys._current_frames().get(self._main)),
        )

    def _report(self, board: Board) -> None:
        """Report, look at other ranks, and end the job if it hangs."""
        beat = self._beat()
        try:
            board.post(self._rank, beat)
            if board.is_hang_declared() and not self._stacks_are_written:
                self._write_stacks()
            diagnosis = None if board.is_watched else self._watch(board, beat)
        except (OSError, RuntimeError):
            return  # the store is gone, as at the end of a job, or will be named when the rank is overdue
        self._answered = time.monotonic()
        if diagnosis is not None:
            with suppress(OSError, RuntimeError):
                board.declare_hang()
            self._end(diagnosis)

    def _watch(self, board: Board, beat: Beat) -> str | None:
        """Return the diagnosis of a job that hangs, if it is this rank's task to find it."""
        is_late = beat.elapsed > beat.limit + _REPORTS * self._period
        if self._rank == 0 or is_late or 0 in self._watcher.silent:
            return self._watcher.update(board.read(range(self._size)))
        self._watcher.update(board.read([0]))
        return None

    def _write_stacks(self) -> None:
        self._stacks_are_written = True
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)

    def _end(self, diagnosis: str) -> NoReturn:
        """End this process, after a time for the stacks of others, whom torchrun or the scheduler ends then."""
        with suppress(OSError):
            self._write_stacks()
        time.sleep(2 * self._period)
        message = diagnosis + stacks_text(self._stacks.parent)
        get_error_handler().record_exception(RankError(message))
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        os._exit(1)


@contextmanager
def monitored(timeout: float, stacks: Path) -> Iterator[Monitor]:
    """Run a monitor in the block, with the board that this process's job has: see Monitor."""
    monitor = Monitor(_board(timeout), timeout, stacks)
    monitor.start()
    try:
        yield monitor
    finally:
        monitor.close()


def _board(timeout: float) -> Board | None:
    if FOLDER in os.environ:
        return FolderBoard(Path(os.environ[FOLDER]))
    if dist.get_world_size() == 1 or "MASTER_PORT" not in os.environ:
        return None
    return StoreBoard(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), _patience(timeout) / _REPORTS)


def _patience(timeout: float) -> float:
    return min(_LONGEST_PATIENCE, _PATIENCE_OF_TIMEOUT * timeout)


def _store_address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _torch_communication(frame: FrameType | None) -> FrameType | None:
    """Return the frame of torch.distributed in which a thread is, if it is the innermost but for calls of operators."""
    while frame is not None and _module(frame) == "torch._ops":
        frame = frame.f_back
    # DTensors dispatch what they compute from torch.distributed, too.
    if frame is None or not _module(frame).startswith("torch.distributed."):
        return None
    return None if _module(frame).startswith("torch.distributed.tensor.") else frame


def _where(frame: FrameType | None) -> str:
    """Return the innermost line of longctx in a stack."""
    while frame is not None:
        if _module(frame).startswith("longctx."):
            return f"{_module(frame)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "its start"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))

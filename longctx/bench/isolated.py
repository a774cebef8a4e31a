"""Isolated measurement: runs functions in a new process, with fresh memory, caches and threads."""

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Reports = Callable[[Any], None]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PATIENCE = 10.0
"""Seconds to wait for a killed process: one that the kernel holds, in a driver's call, is left behind."""
_EARLY = 0.9
"""Fraction of the time limit after which the process writes its stack to the log, to show where it hangs."""
_reports: Connection | None = None
"""In an isolated process, the pipe to its parent while a function runs."""


class IsolatedProcessError(RuntimeError):
    """The function raised, its process died, or it exceeded its time. `reason` is one line; the message is the full
    traceback."""

    def __init__(self, reason: str, text: str, *, died: bool = False, timed_out: bool = False) -> None:
        super().__init__(text)
        self.reason, self.died, self.timed_out = reason, died, timed_out


def report(value: object) -> None:
    """Send an intermediate result to the parent's `on_report`; without effect outside an isolated process."""
    if _reports is not None:
        _reports.send(("report", value, ""))


def _serve(pipe: Connection, threads: int | None, log: str | None, parent: int) -> None:
    """Run the functions that the pipe brings, one after the other."""
    global _reports
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # With this process end those that it starts, and it does not outlive its parent.
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if log is not None:
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    faulthandler.enable(file=2)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    while True:
        try:
            function, args, seconds = pipe.recv()
        except EOFError:
            return
        if seconds is not None and log is not None:
            faulthandler.dump_traceback_later(_EARLY * seconds, file=2)
        _reports = pipe
        try:
            answer = ("result", function(*args), "")
        except Exception as error:  # noqa: BLE001 - sent to the parent, which raises it
            reason = traceback.format_exception_only(error)[0].splitlines()[0]
            answer = ("error", reason, traceback.format_exc())
        _reports = None
        faulthandler.cancel_dump_traceback_later()
        pipe.send(answer)


class IsolatedProcess:
    """A new process with `threads` torch threads (None: torch's default) that calls one function after the other.

    `log` gets its output, if given. A context manager; the thread that makes the process must outlive it. After an
    IsolatedProcessError with `died` or `timed_out` it is gone; after any other its state, and that of a GPU's context,
    is whatever the error left.
    """

    def __init__(self, threads: int | None = None, log: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._ended = False
        arguments = (other, threads, None if log is None else str(log), os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(
        self, function: Callable[..., R], *args: object, seconds: float | None = None, on_report: Reports | None = None
    ) -> R:
        """Return `function(*args)`; `on_report` gets what it passes to `report`.

        The function must be importable by name, its arguments and result picklable. Raises IsolatedProcessError; with
        `timed_out` after `seconds`.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            self._pipe.send((function, args, seconds))
            while True:
                if deadline is not None and not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                    self.close()
                    reason = f"it took more than {seconds:.4g} s"
                    raise IsolatedProcessError(reason, reason, timed_out=True)
                kind, value, text = self._pipe.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    raise IsolatedProcessError(value, text)
                if on_report is not None:
                    on_report(value)
        except (EOFError, ConnectionError):
            reason = self._death()
            raise IsolatedProcessError(reason, reason, died=True) from None

    def _death(self) -> str:
        """Say how the process ended."""
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        self.close()
        if code == -signal.SIGKILL:
            return "its process was killed, probably for running out of memory"
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with status {code}"

    def close(self) -> bool:
        """End the process and those that it started; return whether it is gone."""
        if not self._ended:
            self._ended = True
            assert self._process.pid is not None
            # Before it has made its group there is only itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join(_PATIENCE)
            self._pipe.close()
        return not self._process.is_alive()


def run_isolated(threads: int | None, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function(*args)` in a new process with `threads` torch threads (None: torch's default).

    The function must be importable by name, its arguments and result picklable. Raises IsolatedProcessError.
    """
    assert not kwargs
    with IsolatedProcess(threads) as process:
        return process.call(function, *args)

"""Entry points of ranks in place of `longctx.launch.train:run_rank`: the same training, with rare events forced."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch.distributed.checkpoint import FileSystemWriter

from longctx.launch.train import run_rank
from longctx.train.trainer import _Trainer


def lazy_switching(**arguments: Any) -> int:
    """A thread that asks for the interpreter waits a second for it: what is a race elsewhere happens at each exit."""
    sys.setswitchinterval(1.0)
    return run_rank(**arguments)


def slow_writing(**arguments: Any) -> int:
    """From the second checkpoint on, a rank's tensors take four seconds to write."""
    writes = 0
    write_data = FileSystemWriter.write_data

    def slowly(writer: FileSystemWriter, *parts: Any) -> Any:
        nonlocal writes
        writes += 1
        written = write_data(writer, *parts)
        if writes > 1:
            time.sleep(4)
        return written

    with patch.object(FileSystemWriter, "write_data", slowly):
        return run_rank(**arguments)


@contextmanager
def a_step_that_waits() -> Iterator[None]:
    """Rank 1 starts the step SIGNALLED_STEP (environment) only when a signal has reached it; rank 0 is in the step."""
    step_of = _Trainer._step

    def step(self: _Trainer, number: int, *others: Any) -> Any:
        while number == int(os.environ["SIGNALLED_STEP"]) and os.environ["RANK"] == "1" and not self.stopped_by:
            time.sleep(0.01)
        return step_of(self, number, *others)

    with patch.object(_Trainer, "_step", step):
        yield


def signalled_in_a_step(**arguments: Any) -> int:
    """A step waits: see a_step_that_waits."""
    with a_step_that_waits():
        return run_rank(**arguments)


def held_steps(**arguments: Any) -> int:
    """Every step waits while there is a file `hold` in the working directory."""
    step_of = _Trainer._step

    def step(self: _Trainer, *others: Any) -> Any:
        while os.path.exists("hold"):
            time.sleep(0.01)
        return step_of(self, *others)

    with patch.object(_Trainer, "_step", step):
        return run_rank(**arguments)


def killed_in_a_write(**arguments: Any) -> int:
    """The rank KILL_RANK (environment) is killed at its KILL_AT-th change to the run's directory."""
    out, changes = os.path.abspath(arguments["out"]), 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal changes
        path = details[0] if details else None
        if event == "open":
            is_change = isinstance(details[2], int) and bool(details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            is_change = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree")
        if is_change and isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(out):
            changes += 1
            if changes == int(os.environ["KILL_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == os.environ["KILL_RANK"]:
        sys.addaudithook(watch)
    return run_rank(**arguments)

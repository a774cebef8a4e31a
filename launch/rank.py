"""Process of one rank: `python -m longctx.launch.rank FOLDER PARENT`.

FOLDER contains `job.json`, the job to run. An error that ends the rank is written to `error-<rank>.json` there, so that
the parent can show the first one. PARENT is the pid of the launcher; the rank dies with it.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypedDict

from longctx.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Job(TypedDict):
    """The job of every rank: `entry` (`module:function`), called with the keyword `arguments`.

    It returns the exit status of the rank; None is 0.
    """

    entry: str
    arguments: dict[str, object]


class RankReport(TypedDict):
    """The error that ended a rank: class, message, traceback, and time in seconds since the epoch."""

    is_user_error: bool
    kind: str
    message: str
    trace: str
    time: float


def main() -> None:
    """Run the job in this process, as the rank that torchrun's environment variables define."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    die_with(parent)
    rank = int(os.environ["RANK"])

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
        error = error.with_traceback(below(main, trace))
        _report(folder / f"error-{rank}.json", kind, error)
        # The parent shows the first error; those of other ranks are in their logs.
        if rank != 0:
            sys.__excepthook__(kind, error, error.__traceback__)
        # A normal exit would wait for threads that wait for a dead rank, in a collective or a save.
        exit_rank(2 if isinstance(error, UserError) else 1)

    sys.excepthook = end
    job: Job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    module, _, function = job["entry"].partition(":")
    status = getattr(importlib.import_module(module), function)(**job["arguments"])
    exit_rank(status or 0)


def exit_rank(status: int) -> NoReturn:
    """Exit this rank's process with `status`, skipping interpreter shutdown.

    During shutdown, a gloo thread that still frees the tensors of a finished collective would be killed, and C++ would
    abort with `terminate called without an active exception` and SIGABRT (docs/checkpoints.md). The rank has closed its
    files by now, so nothing is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, however it ends: no rank outlives its launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl took effect
        os._exit(1)


def below(caller: Callable[..., object], trace: TracebackType | None) -> TracebackType | None:
    """Return `trace` from what `caller` called on, without the frames of the launcher."""
    while trace is not None and trace.tb_frame.f_code is not caller.__code__:
        trace = trace.tb_next
    return trace and trace.tb_next


def _report(path: Path, kind: type[BaseException], error: BaseException) -> None:
    report: RankReport = {
        "is_user_error": isinstance(error, UserError),
        "kind": f"{kind.__module__}.{kind.__qualname__}",
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
        "time": time.time(),
    }
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(report), encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()

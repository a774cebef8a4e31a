"""The process of one rank: `python -m longctx.launch.rank FOLDER PARENT`.

FOLDER holds `job.json`, what to run; an error that ends the rank is written there as `error-<rank>.json`, for the
parent to show the one that caused the others. PARENT is the process that started the rank, and the rank dies with it.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypedDict

from longctx.errors import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Job(TypedDict):
    """What every rank runs: `entry` as `module:function`, called with `arguments` as keywords."""

    entry: str
    arguments: dict[str, object]


class RankReport(TypedDict):
    """The error that ended a rank: its class, its message, its traceback, and seconds since the epoch."""

    is_user_error: bool
    kind: str
    message: str
    trace: str
    time: float


def main() -> None:
    """Run the job in this process, which torchrun's environment variables make a rank."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    rank = int(os.environ["RANK"])

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
        error = error.with_traceback(_below_main(trace))
        _report(folder / f"error-{rank}.json", kind, error)
        # The parent shows the error that came first; the others stay in their rank's log.
        if rank != 0:
            sys.__excepthook__(kind, error, error.__traceback__)
        # Threads that wait for a dead rank, in a collective or a save, would keep a normal exit from ending.
        leave(2 if isinstance(error, UserError) else 1)

    sys.excepthook = end
    job: Job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    module, _, function = job["entry"].partition(":")
    getattr(importlib.import_module(module), function)(**job["arguments"])
    leave(0)


def leave(status: int) -> NoReturn:
    """End this rank's process with `status`, without the interpreter's own end.

    A thread of gloo that still frees a finished collective's tensors while the interpreter ends is ended by it, which
    C++ answers with `terminate called without an active exception` and SIGABRT (docs/checkpoints.md). By now what the
    rank had open is closed, so that nothing is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` is gone, however it ends: no rank outlives its launcher."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def _below_main(trace: TracebackType | None) -> TracebackType | None:
    """`trace` from the job's function on: how it was started tells a reader nothing."""
    while trace is not None and trace.tb_frame.f_code is not main.__code__:
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

"""Runner of the GPU benchmark: steps in processes of their own, under time limits, each result written as it comes.

A step that raises, hangs, dies or faults costs one line of the results; the next step gets a new process. A step that
ends well leaves its process to the next one of its phase, since importing torch takes seconds.
"""

import gc
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longctx.bench.isolated import IsolatedProcess, IsolatedProcessError

Status = Literal["ok", "failed", "timeout", "crashed", "skipped"]
LEAST = 1.0
"""Seconds that must be left in a phase to start a step."""
_LOGGED = 64 * 1024
"""Bytes of a step's output that are kept."""
_TRACE = 1500
"""Characters of a traceback that go into the results."""
_SHOWN = 150
"""Characters of a result on the terminal."""
_SKIPPED = "skip"
_GPU_FAULTS = ("CUDA error", "AcceleratorError", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL error")
"""In the reason of an error: the GPU's context is lost, as a process is that dies."""


class Skip(Exception):  # noqa: N818 - not an error
    """Raised by a step that cannot run here; the message says why."""


@dataclass(frozen=True)
class Step:
    """One result: `call`, "module:function", with `args`, in at most `seconds`.

    The function returns a dict that goes into the result's line; what it passes to `longctx.bench.isolated.report`
    before goes there too, also if it does not end well.
    """

    name: str
    call: str
    args: tuple[Any, ...] = ()
    seconds: float = 30.0


@dataclass(frozen=True)
class Phase:
    """Steps in order, `workers` at a time, that may run until `until`, in seconds from the start of the part."""

    name: str
    until: float
    steps: tuple[Step, ...]
    workers: int = 1


@dataclass
class Results:
    """The results of a part, `<out>/<part>.jsonl`, and the steps' output, `<out>/<part>.log`."""

    out: Path
    part: str = "first"
    rows: list[dict[str, Any]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def file(self) -> Path:
        """The results file."""
        return self.out / f"{self.part}.jsonl"

    @property
    def log(self) -> Path:
        """The output of the steps."""
        return self.out / f"{self.part}.log"

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def write(self, row: dict[str, Any], log: str = "") -> None:
        """Append a row to the file, through to the disk, and print it."""
        line = json.dumps(row, default=str)
        with self._lock:
            self.rows.append(row)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            if log:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(f"==== {row.get('step')}: {row.get('status')}\n{log}\n")
            if "status" in row:
                print(f"{self.elapsed:6.1f} s  {row['status']:7}  {row['step']:44} {_brief(row)}".rstrip(), flush=True)


def _brief(row: dict[str, Any]) -> str:
    """Return the numbers and short texts of a row for the terminal."""
    parts = [f"{row['seconds']:.1f} s"] if row.get("seconds") else []
    for name, value in row.items():
        if name in ("step", "status", "seconds", "trace") or value is None:
            continue
        if isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        elif isinstance(value, (int, str)):
            parts.append(f"{name} {value}")
        elif isinstance(value, dict) and "ms" in value:
            parts.append(f"{name} {value['ms']:.4g} ms")
    return ", ".join(parts).replace("\n", " ")[:_SHOWN]


def call_by_name(name: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """Call "module:function" in this process; a `Skip` becomes a result under `_SKIPPED`."""
    module, _, function = name.partition(":")
    try:
        result: dict[str, Any] = getattr(importlib.import_module(module), function)(*args)
    except Skip as skip:
        return {_SKIPPED: str(skip)}
    _release_memory()
    return result


def _release_memory() -> None:
    """Give memory that torch keeps for later back to the GPU: other processes check and compile beside this one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def run(phases: Sequence[Phase], results: Results) -> int:
    """Run the phases one after the other; return how many steps did not end well. A phase that ends early leaves its
    time to the next ones."""
    before = len(results.rows)
    for phase in phases:
        _run_phase(phase, results)
    return sum(row["status"] not in ("ok", "skipped") for row in results.rows[before:])


def _run_phase(phase: Phase, results: Results) -> None:
    waiting, lock = list(phase.steps), threading.Lock()

    def work(slot: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            worker = _Worker(Path(folder) / "log")
            try:
                while True:
                    with lock:
                        if not waiting:
                            return
                        step = waiting.pop(0)
                    row, log = worker.run(step, phase.until - results.elapsed)
                    results.write(row, log)
            finally:
                worker.close()

    # Each process is made by a thread that ends after it.
    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(min(phase.workers, len(waiting)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Worker:
    """A process for step after step; a new one after each that did not end well."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: IsolatedProcess | None = None

    def run(self, step: Step, left: float) -> tuple[dict[str, Any], str]:
        """Run a step in at most `left` seconds; return its row and its output."""
        if left < LEAST:
            return {"step": step.name, "status": "skipped", "seconds": 0.0, "reason": "no time left"}, ""
        began = time.monotonic()
        read = self.log.stat().st_size if self.log.exists() else 0
        reported: dict[Any, Any] = {}
        status: Status = "ok"
        try:
            if self.process is None:
                self.process = IsolatedProcess(log=self.log)
            # The time of its start counts, too.
            limit = min(step.seconds, left) - (time.monotonic() - began)
            result = self.process.call(
                call_by_name,
                step.call,
                step.args,
                seconds=max(0.0, limit),
                on_report=reported.update,
            )
            if _SKIPPED in result:
                status, result = "skipped", {"reason": result[_SKIPPED]}
        except IsolatedProcessError as error:
            fault = any(text in error.reason for text in _GPU_FAULTS)
            status = "timeout" if error.timed_out else "crashed" if error.died or fault else "failed"
            result = {"error": error.reason[:300]}
            if not error.died and not error.timed_out:
                result["trace"] = str(error)[-_TRACE:]
            self.close()
        if result.pop("wrong", False):
            status = "failed"
        row = {"step": step.name, "status": status, "seconds": round(time.monotonic() - began, 2)}
        return {**row, **reported, **result, **row}, self._output(read)

    def _output(self, read: int) -> str:
        """Return what was written to the log after `read` bytes, its end if it is long."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(read, self.log.stat().st_size - _LOGGED))
            return file.read().decode("utf-8", "replace").strip()

    def close(self) -> None:
        """End the process; one that the kernel holds is left behind."""
        if self.process is not None:
            self.process.close()
            self.process = None

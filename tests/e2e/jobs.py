"""`longctx train` of the tests' tiny recipe (`tests.train.runs`), as a user starts it: in processes of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from longctx.engines.metrics import FILE_NAME, Metrics, read_metrics

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """`longctx train tiny.toml` in `folder`, into its `out`."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        ranks: int = 2,
        entry: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`entry`: a function of `tests.e2e.entries` that the ranks run in place of the trainer's own."""
        self.folder = folder
        command = [sys.executable, "-m", "longctx"] if entry is None else [sys.executable, "-m", "tests.e2e.start"]
        command += [] if entry is None else [entry]
        command += ["train", "tiny.toml", *arguments, "--out", "out", "--nproc", str(ranks)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | dict(environment or {})
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def wait(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        try:
            stdout, stderr = self.process.communicate(timeout=100)
        finally:
            self.process.kill()
        return self.process.returncode, stdout, stderr

    def ranks(self) -> list[int]:
        """The processes of the ranks that run, in order."""
        children = [p for p in psutil.Process(self.process.pid).children() if "longctx.launch.rank" in p.cmdline()]
        return [p.pid for p in sorted(children, key=lambda p: int(p.environ()["RANK"]))]

    def metrics(self) -> Metrics:
        return read_metrics(self.folder / "out" / FILE_NAME)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait while the job runs; an end before that is an error with what the job said."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended: {self.wait()}")
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        """Wait until the metrics hold `step`."""
        path = self.folder / "out" / FILE_NAME
        self.wait_until(lambda: path.exists() and any(m.step >= step for m in read_metrics(path).steps))

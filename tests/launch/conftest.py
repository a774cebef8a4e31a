"""Launchers in processes of their own, with ranks that do what `fake_ranks` says in place of training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).resolve().parent


class Launcher:
    """A launcher that runs `function` on `ranks` ranks; `folder` is where they leave their marks. `node`: of how many
    nodes it is which, if of several."""

    def __init__(
        self, folder: Path, function: str, ranks: int = 2, *, save: float = 20, settle: float = 5, **popen: Any
    ) -> None:
        self.folder = folder
        self.began = time.monotonic()
        node = popen.pop("node", ())
        arguments = [function, str(ranks), str(folder), str(save), str(settle), *map(str, node)]
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environment |= {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"} | popen.pop("env", {})
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        command = [sys.executable, str(HERE / "fake_launcher.py"), *arguments]
        self.process = subprocess.Popen(command, env=environment, text=True, **streams)

    def wait(self) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        stdout, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stdout, stderr

    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    def pids(self) -> list[int]:
        """The processes of 2 ranks, once both are ready."""
        files = [self.folder / f"ready-{rank}" for rank in (0, 1)]
        self.wait_until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    @staticmethod
    def is_running(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @staticmethod
    def wait_until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 15
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    """Start a Launcher in the test's folder; none outlives the test."""
    started: list[Launcher] = []
    # Which a launcher would go on to ignore where these tests run under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def start(function: str, *arguments: Any, **options: Any) -> Launcher:
        started.append(Launcher(tmp_path, function, *arguments, **options))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.kill()
        launcher.process.wait()
    signal.signal(signal.SIGHUP, before)

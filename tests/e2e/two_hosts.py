"""Two hosts on this machine, for tests of jobs across hosts: namespaces with a network, a name and processes of their
own, on one file system.

A host has a link of `longctx.launch.hosts`, the name `node0` or `node1`, which resolves to its address on both, and a
process namespace whose first process is the host: with it everything on the host dies, as does the host with the test.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from longctx.launch.hosts import INTERFACE, address, hosts
from tests.e2e.jobs import ROOT

NAMES = ("node0", "node1")
GBIT = 1.0
STEPS = ("train.steps=12", "train.sequences_per_step=1", "checkpoint.every=3", "checkpoint.keep=4")
"""Of the run that two ranks compute, on hosts or on Slurm's nodes."""
_TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount", "hostname")
_SPACES = ("--mount", "--uts", "--pid")


def why_not(*tools: str) -> str:
    """What is missing here for two hosts with these commands; empty if nothing is."""
    if os.geteuid() != 0:
        return "takes root, for namespaces"
    missing = [tool for tool in (*_TOOLS, *tools) if shutil.which(tool) is None]
    if missing:
        return f"takes the commands {', '.join(missing)} (Debian: iproute2, util-linux, slurm-wlm, munge)"
    tried = subprocess.run(["unshare", "--net", *_SPACES, "--fork", "--mount-proc", "true"], capture_output=True)
    return "takes the right to create namespaces" if tried.returncode else ""


_WHY_NOT = why_not()
needs_hosts = pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)


class Host:
    """One of the two: commands run on it until it is killed, and after it is started again."""

    def __init__(self, number: int, prefix: Sequence[str], names: Path) -> None:
        """`prefix`: of a command in its network namespace. `names`: its /etc/hosts."""
        self.name = NAMES[number]
        self.address = address(number)
        self.network = prefix[-1]
        self._prefix, self._names = prefix, names
        self.start()

    def start(self) -> None:
        """Start it, after it was killed too."""
        # Not exec: the shell is the first process of the host, which has to wait for those that lost their parents.
        begin = f"hostname {self.name} && mount --bind '{self._names}' /etc/hosts && echo up; sleep infinity & wait"
        # The signal of setpriv reaches unshare if the test's process dies, and that of unshare the host.
        alive = ["setpriv", "--pdeathsig", "KILL", "unshare", *_SPACES, "--fork", "--mount-proc", "--kill-child"]
        command = [*self._prefix, *alive, "sh", "-c", begin]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(command, text=True, **streams)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer == "up\n", answer
        (self._first,) = psutil.Process(self._process.pid).children()
        self._space = _process_space(self._first)

    def kill(self) -> None:
        """Kill everything on it; its network stays up, and closes its connections."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._first.kill()
        self._process.wait()

    def set_link(self, state: str) -> None:
        """Set its link `up` or `down`: what is sent to it gets no answer."""
        subprocess.run([*self._prefix, "ip", "link", "set", INTERFACE, state], check=True)

    def popen(self, *command: str, cwd: Path, env: Mapping[str, str] | None = None) -> "subprocess.Popen[str]":
        """Start a command on it; stdout and stderr are text, in pipes."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        entered = ["nsenter", "--target", str(self._first.pid), "--net", *_SPACES, f"--wdns={cwd}", "--"]
        return subprocess.Popen([*entered, *command], env=environment() | dict(env or {}), text=True, **streams)

    def processes(self) -> list[psutil.Process]:
        """Everything on it."""
        return [process for process in psutil.process_iter() if _process_space(process) == self._space]


def _process_space(process: psutil.Process) -> str:
    """The name of a process's namespace of processes; empty if it has ended, or is not ours."""
    try:
        return os.readlink(f"/proc/{process.pid}/ns/pid")
    except (FileNotFoundError, PermissionError):
        return ""


def environment() -> dict[str, str]:
    """What jobs on the hosts start with."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, which are removed with all that runs on them."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longctx-hosts-")))
        names = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address(number)} {name}" for number, name in enumerate(NAMES))]
        names.write_text("\n".join(lines) + "\n")
        prefixes = stack.enter_context(hosts(len(NAMES), GBIT))
        found = []
        for number, prefix in enumerate(prefixes):
            found.append(Host(number, prefix, names))
            stack.callback(found[-1].kill)
        first, second = found
        yield first, second


def wait_until(condition: Callable[[], bool], timeout: float, message: Callable[[], str]) -> None:
    """Wait, at most `timeout` seconds; an AssertionError with the message if it does not happen."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, message()
        time.sleep(0.1)

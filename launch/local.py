"""Starting the ranks of a job on this machine, and seeing them to their end.

The ranks get torchrun's environment and cannot tell the difference. torchrun itself is not used here because of how
runs end: its agent orders failures by whole seconds, and so often shows a consequence instead of the cause; it has one
grace period for a rank that saves and for one that waits for a dead peer; and after a signal the ranks' exit statuses
are lost.

How a job ends, and the exit status:

- every rank returned: 0
- a UserError: its message once, 2
- any other error: the traceback of the rank that failed first, 1
- a rank killed by a signal: one line that names both, 1
- SIGINT, SIGTERM or SIGHUP sent to the launcher: the ranks get SIGTERM, have `Limits.save` seconds to save and return,
  and the status is 128 + the signal, as shells and schedulers expect of what a signal ended: a run that was stopped is
  not a run that is done. A second Ctrl-C kills the ranks at once.

After a failure the other ranks have `Limits.settle` seconds to end by themselves, then they are killed; a checkpoint
is complete or absent, so that none is harmed. Ranks die with the launcher also where it is killed itself.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from longctx.errors import UserError
from longctx.launch.rank import Job, RankReport
from longctx.launch.terminal import echo, echo_error, show_cursor

_POLL = 0.05
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Has glibc keep freed memory instead of giving each large tensor's pages back to the system, which a CPU rank would
spend as much time on as on arithmetic (measured: 27 of 101 CPU seconds at 131,072 tokens a step)."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SECONDHAND = re.compile(r"longctx\.parallel\.agreement\.RankError|torch\.distributed\.Dist\w*Error|/gloo/transport/")
"""In the class or the message of an error that a rank raises because another one failed."""


@dataclass(frozen=True)
class Limits:
    """How long ranks may take to end, in seconds."""

    save: float = 300.0
    """To save a checkpoint and return, after a signal."""
    settle: float = 10.0
    """To end by themselves, after another rank failed."""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    status: int | None = None
    """Exit status, or minus the signal that ended it; None while it runs."""
    ended: float = 0.0
    """When it was seen to have ended, in seconds since the epoch."""
    was_killed: bool = False
    """By the launcher, that is."""
    report: RankReport | None = None

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the rank alone: what it started (readers of data, say) is its own to end, after the save."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.was_killed = True
        self._kill_group()

    def _kill_group(self) -> None:
        # The rank leads a process group of its own and is not reaped yet, so that the number is still its.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def has_ended(self, folder: Path) -> bool:
        """Whether the rank has just ended; then its status and report are taken, and what it left behind is killed."""
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        self.ended = time.time()
        self._kill_group()
        self.status = self.process.wait()
        path = folder / f"error-{self.number}.json"
        if path.exists():
            self.report = json.loads(path.read_text(encoding="utf-8"))
        return True


@dataclass
class _Job:
    folder: Path
    limits: Limits
    ranks: list[_Rank] = field(default_factory=list)
    signals: list[signal.Signals] = field(default_factory=list)
    """Those that the launcher received."""

    def running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.status is None]

    def watch(self) -> None:
        """Return once every rank has ended."""
        heeded = 0
        failed = False
        deadline = float("inf")
        while running := self.running():
            for rank in running:
                if rank.has_ended(self.folder) and rank.status != 0 and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + self.limits.settle)
            for number in self.signals[heeded:]:
                heeded += 1
                if heeded == 1:
                    deadline = min(deadline, time.monotonic() + self.limits.save)
                    self._ask_to_stop(number)
                elif number == signal.SIGINT:
                    deadline = 0.0
            if time.monotonic() >= deadline:
                self.kill()
                deadline = float("inf")
            time.sleep(_POLL)

    def _ask_to_stop(self, number: signal.Signals) -> None:
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        echo(f"{number.name}: the ranks save and stop, within {self.limits.save:g} s{again}")
        for rank in self.running():
            rank.ask_to_stop()

    def kill(self) -> None:
        for rank in self.running():
            rank.kill()


def run_ranks(
    entry: str,
    arguments: Mapping[str, object],
    *,
    ranks: int,
    logs: Path,
    advice: str = "",
    limits: Limits | None = None,
) -> int:
    """Call `entry` (`module:function`) with `arguments` on `ranks` processes of this machine; the exit status.

    `arguments` must survive JSON. Rank 0 keeps this process's stdout and stderr; what the others print goes to
    `logs/rank-N.log`. `advice` is said after a failure or a stop. To be called in the main thread, which receives the
    signals. Raises UserError where `logs` cannot be made.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{logs}: cannot be made: {error.strerror}; choose another --out") from None
    with (
        tempfile.TemporaryDirectory(prefix="longctx-") as folder,
        _free_port() as port,
    ):
        content: Job = {"entry": entry, "arguments": dict(arguments)}
        (Path(folder) / "job.json").write_text(json.dumps(content), encoding="utf-8")
        job = _Job(Path(folder), limits or Limits())
        with _received_signals(job.signals):
            try:
                for number in range(ranks):
                    job.ranks.append(_Rank(number, _start(number, ranks, port, folder, logs)))
                job.watch()
            finally:
                job.kill()
        return _conclude(job, logs, advice)


def _start(number: int, ranks: int, port: int, folder: str, logs: Path) -> subprocess.Popen[bytes]:
    environment = {
        "OMP_NUM_THREADS": str(threads_per_rank(ranks)),
        **KEEP_MEMORY,
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-X", "faulthandler", "-m", "longctx.launch.rank", folder, str(os.getpid())]
    # A session of its own keeps the terminal's Ctrl-C from the rank: signals reach it once, from here.
    if number == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    with (logs / f"rank-{number}.log").open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def threads_per_rank(ranks: int) -> int:
    """OMP threads for each of `ranks` processes, so that together they take the cores that this one may use."""
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or sys.maxsize)
    return max(1, cores // ranks)


@contextlib.contextmanager
def _free_port() -> Iterator[int]:
    """A port for rank 0 to listen on, held against every other program until the job ends.

    The socket is bound and never listens: with SO_REUSEADDR, which torch's store sets too, Linux lets rank 0 bind and
    listen beside it, and gives the port to nobody who asks for a free one.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


@contextlib.contextmanager
def _received_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Append what would stop this process to `received` instead; a signal that it ignores stays ignored (nohup)."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    heard = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def _conclude(job: _Job, logs: Path, advice: str) -> int:
    """Say how the job ended; its exit status."""
    stop = job.signals[0] if job.signals else None
    # SIGTERM is how a rank dies that was asked to stop before it was ready to save.
    ended_unasked = [rank for rank in job.ranks if not rank.was_killed and (not stop or rank.status != -signal.SIGTERM)]
    failures = sorted((rank for rank in ended_unasked if rank.status != 0), key=_precedence)
    if any(rank.status is not None and rank.status < 0 for rank in job.ranks):
        show_cursor()
    if failures:
        return _explain(failures, job, logs, advice)
    if stop is None:
        return 0
    unsaved = [rank for rank in job.ranks if rank.status != 0]
    if unsaved:
        echo(f"stopped by {stop.name}; {_names(unsaved)} ended without saving. {advice}".rstrip())
    else:
        echo(f"stopped by {stop.name}. {advice}".rstrip())
    return 128 + stop


def _precedence(rank: _Rank) -> tuple[int, float]:
    """Sorts what caused a failure before what followed from it.

    A signal from outside comes first: the peers' errors may be noted before the death is seen. SIGABRT may be torch's
    own answer to a peer that is gone, so it only counts by its time.
    """
    if rank.report is not None:
        is_secondhand = _SECONDHAND.search(f"{rank.report['kind']}: {rank.report['message']}")
        return (2 if is_secondhand else 1), rank.report["time"]
    is_signal = rank.status is not None and rank.status < 0 and rank.status != -signal.SIGABRT
    return (0 if is_signal else 1), rank.ended


def _explain(failures: list[_Rank], job: _Job, logs: Path, advice: str) -> int:
    cause = failures[0]
    others = ", and the others were stopped" if len(job.ranks) > 1 else ""
    if cause.report is None:
        how = f"exited with status {cause.status}"
        if cause.status is not None and cause.status < 0:
            how = f"was killed by {signal.Signals(-cause.status).name}"
        if cause.status == -signal.SIGKILL:
            how += " (where nobody sent it: by the kernel, for want of memory; see dmesg)"
        log = f"; its output: {logs / f'rank-{cause.number}.log'}" if cause.number else ""
        echo_error(f"rank {cause.number} {how}{others}{log}. {advice}".rstrip())
        return 1
    if cause.report["is_user_error"]:
        # Ranks that agree on an error all raise it, and the lowest speaks for them.
        texts = {
            rank.number: rank.report["message"] for rank in failures if rank.report and rank.report["is_user_error"]
        }
        echo_error(texts[min(texts)])
        return 2
    echo(cause.report["trace"].rstrip("\n"))
    echo_error(f"rank {cause.number} failed with the error above{others}. {advice}".rstrip())
    return 1


def _names(ranks: list[_Rank]) -> str:
    numbers = ", ".join(str(rank.number) for rank in ranks)
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"

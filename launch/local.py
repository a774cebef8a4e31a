"""Local launcher: starts the ranks of a job on this machine and supervises them.

The ranks get the environment variables of torchrun. In a job on this machine alone they find each other through a file
in the job's private folder, so that no port is open to the network; where this machine is one of a job's nodes, each
with a launcher, they meet at the address that the job names. torchrun itself is not used because of how runs end: its
agent orders failures by whole seconds, and so often reports a consequence instead of the cause; it has the same grace
period for a rank that saves and for one that waits for a dead peer; and after a signal the ranks' exit statuses are
lost.

Exit status of a job:

- every rank returned: 0
- a UserError: 2; its message is printed once
- any other error: 1; the traceback of the rank that failed first is printed
- a rank killed by a signal: 1; one line names both
- ranks that wait for one that does not come (`longctx.health`): 1; the message names it, and where each rank is
- SIGINT, SIGTERM or SIGHUP sent to the launcher: 128 + the signal, as shells and schedulers expect. The ranks get
  SIGTERM and have `Limits.save` seconds to save and return. A second Ctrl-C kills them immediately.
- SIGINT or SIGTERM sent to a rank, which then stops all of them after a save: 128 + the signal

After a failure the other ranks have `Limits.settle` seconds to exit, then they are killed; checkpoints are written
atomically, so none is damaged. Ranks also die if the launcher is killed.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from longctx.errors import UserError
from longctx.files import temporary_folder
from longctx.health.beat import FOLDER, STACKS, FolderBoard
from longctx.health.diagnosis import Watcher, stacks_text
from longctx.launch.job_environment import NodeOfJob, counted
from longctx.launch.rank import Job, RankReport
from longctx.launch.rank_settings import rank_settings
from longctx.launch.terminal import echo, echo_error, show_cursor
from longctx.parallel.one_machine import LOOPBACK, STORE
from longctx.train.stop_signal import listen

_POLL = 0.05
_WATCH = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOPPED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM)}
"""The signal that stopped a rank which saved and returned, by the rank's exit status."""
_ERROR = "error: "
"""Begins the line of a rank that ends itself, as one that hangs (`longctx.health.monitor`), which leaves no report."""
_TAIL = 65536
"""Bytes of a log, from its end, that are read for it."""
_RANK_ERROR = re.compile(r"longctx\.parallel\.rank_errors\.RankError")
_SECONDHAND = re.compile(rf"{_RANK_ERROR.pattern}|torch\.distributed\.Dist\w*Error|/gloo/transport/")
"""Matches the class or message of an error that a rank raises because another one failed."""


@dataclass(frozen=True)
class Limits:
    """Time limits for ranks to exit, in seconds."""

    save: float = 300.0
    """To save a checkpoint and return, after a signal."""
    settle: float = 10.0
    """To exit, after another rank failed."""
    stacks: float = 3.0
    """To write its stacks, after a hang was found."""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path | None
    """File of its output; None: that of this process."""
    log_start: int
    """Bytes that the file held before."""
    status: int | None = None
    """Exit status, or minus the signal that killed it; None while it runs."""
    ended: float = 0.0
    """When its end was noticed, in seconds since the epoch."""
    was_killed: bool = False
    """Whether the launcher killed it."""
    report: RankReport | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the rank has ended, and neither returned nor saved and stopped."""
        return self.status is not None and self.status != 0 and self.status not in _STOPPED

    def ask_to_stop(self) -> None:
        """Send SIGTERM only to the rank: it ends its own children (such as data readers) itself, after the save."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.was_killed = True
        self._kill_group()

    def _kill_group(self) -> None:
        # The rank leads its own process group and is not reaped yet, so the pid cannot have been reused.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def has_ended(self, folder: Path) -> bool:
        """Check whether the rank has ended; if so, record its status and report, and kill its children."""
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
    node: NodeOfJob | None = None
    on_stop: str = ""
    """What ranks do when they are asked to stop, for a line."""
    ranks: list[_Rank] = field(default_factory=list)
    signals: list[signal.Signals] = field(default_factory=list)
    """Signals that the launcher received."""
    hang: str | None = None
    """The diagnosis of a job that hung."""
    watcher: Watcher = field(default_factory=Watcher)
    next_look: float = 0.0
    """When the ranks' reports are read next, by the monotonic clock."""

    def running(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.status is None]

    def watch(self) -> None:
        """Wait until every rank has ended."""
        handled = 0
        failed = False
        deadline = float("inf")
        while running := self.running():
            for rank in running:
                if rank.has_ended(self.folder) and rank.has_failed and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + self.limits.settle)
            for number in self.signals[handled:]:
                handled += 1
                if handled == 1:
                    deadline = min(deadline, time.monotonic() + self.limits.save)
                    self._ask_to_stop(number)
                elif number == signal.SIGINT:
                    deadline = 0.0
            if not failed and self._has_just_hung(running):
                deadline = min(deadline, time.monotonic() + self.limits.stacks)
            if time.monotonic() >= deadline:
                self.kill()
                deadline = float("inf")
            time.sleep(_POLL)

    def _has_just_hung(self, running: list[_Rank]) -> bool:
        """Read the ranks' reports, each half second; if they show a hang for the first time, ask for stacks."""
        if self.hang is not None or time.monotonic() < self.next_look:
            return False
        board = FolderBoard(self.folder)
        self.hang = self.watcher.update(board.read([rank.number for rank in running]))
        self.next_look = time.monotonic() + _WATCH
        if self.hang is None:
            return False
        board.declare_hang()
        return True

    def _ask_to_stop(self, number: signal.Signals) -> None:
        again = "; press Ctrl-C again to stop immediately" if number == signal.SIGINT else ""
        echo(f"{number.name}: {self.on_stop}, within {self.limits.save:g} s{again}")
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
    node: NodeOfJob | None = None,
    title: str = "",
    advice: str = "",
    limits: Limits | None = None,
    on_stop: str = "saving and stopping",
) -> int:
    """Call `entry` (`module:function`) with `arguments` in `ranks` processes on this machine; return the exit status.

    `node`: this machine's place among those of a job, each of which has a launcher with as many ranks; None: the job is
    on this machine alone. `arguments` must be JSON-serialisable. `title`: what they do, for a line at the start; empty:
    no line. Rank 0 inherits this process's stdout and stderr; the output of other ranks goes to `logs/rank-N.log`.
    `advice` is printed after a failure or a stop, `on_stop` when the ranks are asked to stop. Must be called in the
    main thread, which receives the signals. Raises UserError if `logs` cannot be created.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
        if node is None or node.node == 0:
            for earlier in logs.glob(STACKS.format("*")):
                earlier.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{logs}: cannot be created: {error.strerror}; choose another --out") from None
    if title:
        where = "on this machine" if node is None else f"({node.describe()})"
        echo(f"Starting {counted(ranks, 'rank')} {where}: {title}")
    with temporary_folder("job") as folder:
        content: Job = {"entry": entry, "arguments": dict(arguments)}
        (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")
        job = _Job(folder, limits or Limits(), node, on_stop)
        with _received_signals(job.signals):
            try:
                # A signal that came while this process started has stopped the job already.
                for local in range(0 if job.signals else ranks):
                    number = local if node is None else node.node * ranks + local
                    job.ranks.append(_start(number, _environment(local, ranks, folder, node), folder, logs))
                job.watch()
            finally:
                job.kill()
        return _conclude(job, logs, advice)


def _environment(local: int, ranks: int, folder: Path, node: NodeOfJob | None) -> dict[str, str]:
    """Return the environment of the rank `local` of `ranks` on this machine."""
    settings = rank_settings(ranks)
    place = {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(ranks)}
    if node is None:
        alone = {"RANK": str(local), "WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
        # The launcher watches the ranks' heartbeats; those of several machines are in the rendezvous store.
        files = {FOLDER: str(folder), STORE: str(folder / "store")}
        return {**settings, **LOOPBACK, **os.environ, **place, **alone, **files}
    number, size = node.node * ranks + local, node.nodes * ranks
    among = {"RANK": str(number), "WORLD_SIZE": str(size), "GROUP_RANK": str(node.node)}
    meeting = {"MASTER_ADDR": node.meeting.address, "MASTER_PORT": str(node.meeting.port)}
    return {**settings, **os.environ, **place, **among, **meeting}


def _start(number: int, environment: Mapping[str, str], folder: Path, logs: Path) -> _Rank:
    # -P: a file in the working directory does not take the place of a module of the same name.
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "longctx.launch.rank", str(folder), str(os.getpid())]
    # In a new session the rank does not get the terminal's Ctrl-C: signals reach it once, from the launcher.
    if number == 0:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        return _Rank(number, process, None, 0)
    path = logs / f"rank-{number}.log"
    with path.open("ab") as log:
        before = log.tell()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return _Rank(number, process, path, before)


@contextlib.contextmanager
def _received_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Append stop signals to `received` instead of stopping; a signal that is ignored stays ignored (nohup).

    One that was noted before (`longctx.train.stop_signal`) is the first.
    """

    def record(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    for number in _STOP_SIGNALS:
        if noted := listen(number, record):
            received.insert(0, signal.Signals(noted))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(job: _Job, logs: Path, advice: str) -> int:
    """Print how the job ended; return its exit status."""
    stop = job.signals[0] if job.signals else None
    # A rank that is asked to stop before it can save dies of SIGTERM.
    not_stopped = [rank for rank in job.ranks if not rank.was_killed and (not stop or rank.status != -signal.SIGTERM)]
    failures = sorted((rank for rank in not_stopped if rank.has_failed), key=_precedence)
    if any(rank.status is not None and rank.status < 0 for rank in job.ranks):
        show_cursor()
    if job.hang is not None:
        echo_error(f"{job.hang}{stacks_text(logs)} {advice}".rstrip())
        return 1
    if failures:
        return _report_failure(failures, job, logs, advice)
    if stop is None:
        stop = next((_STOPPED[rank.status] for rank in job.ranks if rank.status in _STOPPED), None)
    if stop is None:
        return 0
    unsaved = [rank for rank in job.ranks if rank.has_failed]
    if unsaved:
        echo(f"stopped by {stop.name}; {_names(unsaved)} exited without saving. {advice}".rstrip())
    else:
        echo(f"stopped by {stop.name}. {advice}".rstrip())
    return 128 + stop


def _precedence(rank: _Rank) -> tuple[int, float]:
    """Sort key that puts the cause of a failure before its consequences.

    A signal comes first: the errors of other ranks may be reported before the death is noticed. SIGABRT may be torch's
    reaction to a lost peer, so only its time counts.
    """
    if rank.report is not None:
        is_secondhand = _SECONDHAND.search(f"{rank.report['kind']}: {rank.report['message']}")
        return (2 if is_secondhand else 1), rank.report["time"]
    is_signal = rank.status is not None and rank.status < 0 and rank.status != -signal.SIGABRT
    return (0 if is_signal else 1), rank.ended


def _report_failure(failures: list[_Rank], job: _Job, logs: Path, advice: str) -> int:
    cause = failures[0]
    others = "; the other ranks were stopped" if len(job.ranks) > 1 else ""
    name = f"rank {cause.number}" if job.node is None else f"rank {cause.number} on {socket.gethostname()}"
    if cause.report is None:
        how = f"exited with status {cause.status}"
        if cause.status is not None and cause.status < 0:
            how = f"was killed by {signal.Signals(-cause.status).name}"
        if cause.status == -signal.SIGKILL:
            how += " (by the kernel if memory ran out; see dmesg)"
        log = "" if cause.log is None else f" Its output: {cause.log}."
        echo_error(f"{name} {how}{others}{_last_error(cause)}.{log} {advice}".rstrip())
        return 1
    if cause.report["is_user_error"]:
        # All ranks that agree on an error raise it; print that of the lowest.
        messages = {
            rank.number: rank.report["message"] for rank in failures if rank.report and rank.report["is_user_error"]
        }
        echo_error(messages[min(messages)])
        return 2
    if _RANK_ERROR.search(cause.report["kind"]):
        # Raised where a collective ended, which says nothing of the cause.
        echo_error(cause.report["message"])
        return 1
    echo(cause.report["trace"].rstrip("\n"))
    echo_error(f"{name} failed with the error above{others}. {advice}".rstrip())
    return 1


def _last_error(rank: _Rank) -> str:
    """Return the last error message in a rank's log, for a line; empty if there is none."""
    if rank.log is None:
        return ""
    with rank.log.open("rb") as log:
        log.seek(max(rank.log_start, rank.log.stat().st_size - _TAIL))
        lines = log.read().decode(errors="replace").splitlines()
    said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return f"; it says: {said[-1].rstrip('.')}" if said else ""


def _names(ranks: list[_Rank]) -> str:
    numbers = ", ".join(str(rank.number) for rank in ranks)
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"

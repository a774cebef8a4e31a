"""Lock on a run's directory: one run at a time trains into it, on whatever machines.

`run.lock` names its owner, and its owner touches it every few seconds, the heartbeat. A start that finds one

- refuses at once if the owner is a process of this machine that runs;
- takes it over at once if the owner has ended for certain: it is a process of this machine that is gone, or this start
  is a later one of the same SLURM job (requeue) or of torchrun in the same SLURM step (restart);
- else watches it for `patience` seconds: refuses on a heartbeat, and takes it over without one.

No clock is compared with that of another machine: a heartbeat is a change of the file's modification time. Advisory
locks (flock, fcntl) are not used: NFS may be mounted without them, and a client that loses its server loses them
unseen. Exclusive creation and utime work everywhere. A run that lost its lock, as after its machine was
suspended for longer than `patience`, does not publish a checkpoint any more (`RunLock.check`).
"""

import getpass
import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from longctx.errors import UserError
from longctx.files import writing
from longctx.parallel.rank_errors import raise_on_all_ranks

FILE_NAME = "run.lock"


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    token: str
    """Tells this start from every other."""
    user: str
    host: str
    machine: str
    """Boot and PID namespace within which `pid` is one process; empty if the system does not say."""
    pid: int
    started: int
    """The process's start, in clock ticks since boot."""
    restarts: dict[str, int]
    """How often each job around this process was started before. No two starts of one job run at the same time."""
    since: str
    """When it started, for people."""

    def __str__(self) -> str:
        jobs = "".join(f", {job}" for job in self.restarts)
        return f"process {self.pid} of {self.user} on {self.host}{jobs}, since {self.since}"


_OWNER = TypeAdapter(Owner)


def this_process() -> Owner:
    """Return this process as an owner."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        user = f"uid {os.getuid()}"
    return Owner(
        token=uuid.uuid4().hex,
        user=user,
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or 0,
        restarts=_restarts(),
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _restarts() -> dict[str, int]:
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job is None:
        return {}  # the name of a torchrun job is the user's, and may be that of another
    restarts = {f"SLURM job {job}": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    if step is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        torchrun = f"torchrun job {os.environ['TORCHELASTIC_RUN_ID']} in step {step}"
        restarts[torchrun] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return restarts


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks since boot; None if it has ended."""
    try:
        # Behind the name, which is in parentheses and may contain some: the state is field 3, the start field 22.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class RunLock:
    """The lock of one run's directory, for one process. Not collective: see `locked`."""

    def __init__(self, directory: Path, period: float = 10.0, patience: float = 60.0) -> None:
        """`period`: seconds between heartbeats. `patience`: seconds without one after which an owner has ended."""
        self.path = directory / FILE_NAME
        self._period, self._patience = period, patience
        self._me = this_process()
        self._watched: tuple[str, int] | None = None
        """Token and heartbeat of the lock that is watched, when they were first seen."""
        self._watched_since = 0.0
        self._claimed_since: float | None = None
        self._descriptor = -1
        self._is_new = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def try_acquire(self) -> str | None:
        """Try once to get the lock; return None if this process has it now, else what to wait for, as a sentence.

        To be called about once per second until then. Raises UserError if another run holds the lock, or the directory
        cannot be written.
        """
        with writing(self.path):
            self._is_new = self._is_new or not self.path.parent.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._create():
                return None
            found = _read(self.path)
        if found is None:
            return f"{self.path} was released"
        owner, beat = found
        key = _token(owner), beat
        runs = None if owner is None else self._runs(owner)
        if runs is False:
            self._take_over(key[0])
            return f"{self.path} was left by {owner}, which has ended: taking it over"
        if runs or self._watched not in (None, key):
            raise UserError(self._refusal(owner))
        if self._watched is None:
            self._watched, self._watched_since = key, time.monotonic()
        if time.monotonic() - self._watched_since >= self._patience:
            self._take_over(key[0])
            return f"{self.path} of {_name(owner)} had no heartbeat for {self._patience:g} s: taking it over"
        return f"{self.path} is held by {_name(owner)}: watching for {self._patience:g} s whether that run still runs"

    def check_free(self) -> None:
        """Raise UserError if a run on this machine holds the lock; changes nothing.

        A lock of another machine, whose owner may have ended, counts as free: a start watches it.
        """
        found = _read(self.path)
        if found is not None and found[0] is not None and self._runs(found[0]):
            raise UserError(self._refusal(found[0]))

    def check(self) -> None:
        """Raise UserError if this process does not hold the lock any more."""
        found = _read(self.path)
        if self._is_mine(found):
            return
        who = "removed" if found is None else f"taken over by {_name(found[0])}"
        raise UserError(
            f"{self.path}, the lock of this run, was {who}. Stopped without saving, so that no two runs train into "
            "one directory"
        )

    def release(self) -> None:
        """Stop the heartbeat and remove the lock, if it is held, and a directory made for only it. Idempotent."""
        self._stop.set()
        if self._descriptor < 0:
            return
        self._thread.join()
        os.close(self._descriptor)
        self._descriptor = -1
        with suppress(OSError):
            if self._is_mine(_read(self.path)):
                self.path.unlink()
                if self._is_new:
                    self.path.parent.rmdir()  # an error unless it is empty: of a run that was refused

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, _OWNER.dump_json(self._me))
            os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            self.path.unlink()
            raise
        if not self._is_mine(_read(self.path)):
            # This process was suspended between the two, and another start took over the lock without a name.
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        self._thread.start()
        return True

    def _refusal(self, owner: Owner | None) -> str:
        return (
            f"{self.path.parent} is being trained into by {_name(owner)}. Stop that run, or choose another directory "
            "with --out"
        )

    def _is_mine(self, found: tuple[Owner | None, int] | None) -> bool:
        return found is not None and found[0] == self._me

    def _runs(self, owner: Owner) -> bool | None:
        """Return whether the owner's process runs; None if that cannot be known from here."""
        if owner.machine and owner.machine == self._me.machine:
            return _start_of(owner.pid) == owner.started
        shared = owner.restarts.keys() & self._me.restarts.keys()
        return False if any(owner.restarts[job] < self._me.restarts[job] for job in shared) else None

    def _take_over(self, token: str) -> None:
        """Remove the lock that has this token, so that the next attempt can create one.

        Of several starts that found the same lock one removes it: the one that creates the claim. A later one reads
        another token then.
        """
        self._watched = None
        claim = self.path.with_name(f"{FILE_NAME}.{hashlib.sha256(token.encode()).hexdigest()[:16]}")
        with writing(self.path):
            try:
                os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError:
                self._drop_if_left(claim)
                return
            try:
                found = _read(self.path)
                if found is not None and _token(found[0]) == token:
                    self.path.unlink()
            finally:
                claim.unlink()

    def _drop_if_left(self, claim: Path) -> None:
        """Remove a claim that has been there for `patience` seconds: its owner crashed within a takeover."""
        if self._claimed_since is None:
            self._claimed_since = time.monotonic()
        elif time.monotonic() - self._claimed_since >= self._patience:
            claim.unlink(missing_ok=True)
            self._claimed_since = None

    def _beat(self) -> None:
        while not self._stop.wait(self._period):
            with suppress(OSError):
                os.utime(self._descriptor)  # not the path: that may be another's lock by now


def _token(owner: Owner | None) -> str:
    return "" if owner is None else owner.token


def _name(owner: Owner | None) -> str:
    return "an unnamed process" if owner is None else str(owner)


def _read(path: Path) -> tuple[Owner | None, int] | None:
    """Return the owner, None if the file does not say, and the time of its heartbeat; None if there is no lock."""
    try:
        # Opening a file makes NFS ask the server; its attributes alone may be a minute old. A pipe is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return _parse(file.read(65536)), os.fstat(descriptor).st_mtime_ns


def _parse(content: bytes) -> Owner | None:
    try:
        return _OWNER.validate_json(content)
    except ValidationError:
        return None


@contextmanager
def locked(
    directory: Path, announce: Callable[[str], None], make: Callable[[Path], RunLock] = RunLock
) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run's directory in the block; yield a function that raises UserError if it was lost.

    Collective: rank 0 gets the lock, the others wait. `announce` is called there with what it waits for. Raises
    UserError on every rank if another run has it. The yielded function is for rank 0; elsewhere it does nothing.
    """
    if dist.get_rank() != 0:
        _wait_together(lambda: False)
        yield lambda: None
        return
    lock = make(directory)
    said = None

    def attempt() -> bool:
        nonlocal said
        waits_for = lock.try_acquire()
        if waits_for is not None and waits_for != said:
            announce(waits_for)
            said = waits_for
        return waits_for is not None

    try:
        _wait_together(attempt)
        yield lock.check
    finally:
        lock.release()


def _wait_together(attempt: Callable[[], bool]) -> None:
    """Call `attempt` on every rank, each second, until it returns False on rank 0."""
    waiting: list[bool | None] = [True]
    while waiting[0]:
        with raise_on_all_ranks():
            waiting = [attempt()]
        dist.broadcast_object_list(waiting, src=0)
        if waiting[0]:
            time.sleep(1.0)

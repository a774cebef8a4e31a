"""Jobs on one machine: a private folder for their files, and network interfaces that no other machine reaches.

Imports no torch: launchers start without it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

STORE = "LONGCTX_STORE"
"""Environment variable of a rank: path of the file through which the ranks of a job on one machine find each other."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
"""Environment variables that keep the sockets of collectives on the loopback interface. Without them gloo and NCCL
listen on the interface of the host's name. What the user has set takes precedence."""

_PREFIX = "longctx-"
_LOCK = ".lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextlib.contextmanager
def job_folder(purpose: str) -> Iterator[Path]:
    """Create a temporary folder `longctx-<purpose>-…` that only this user can read; remove it at the end of the block.

    First removes those of jobs that were killed: this user's folders whose lock, which lives as long as the process
    that made them, was taken on this machine since it booted and is free. Others, such as those without a lock, stay.
    Raises OSError if the folder cannot be created.
    """
    parent = Path(tempfile.gettempdir())
    _remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", dir=parent))
    try:
        # Locked before it gets its name: another start never sees a lock that is free because it is young.
        draft = folder / f"{_LOCK}.draft"
        with draft.open("x", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(_boot_id())
            lock.flush()
            draft.rename(folder / _LOCK)
            yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _boot_id() -> str:
    """Return the id of this machine since it booted: a temporary folder may be on a file system that machines share."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def _remove_leftovers(parent: Path) -> None:
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(_PREFIX)]
    for name in names:
        # Without permission, or gone by now: somebody else's.
        with contextlib.suppress(OSError):
            _remove_leftover(parent / name)


def _remove_leftover(folder: Path) -> None:
    """Remove a folder if it is certain that its owner is gone."""
    status = folder.lstat()
    if status.st_uid != os.geteuid() or folder.is_symlink():
        return
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it is in use
        is_current = os.path.samestat(os.fstat(lock), (folder / _LOCK).lstat())  # else another start has removed it
        if is_current and os.read(lock, 100).decode("ascii", "replace").strip() == _boot_id():
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last: the next start can remove what is left if this process is killed meanwhile."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _LOCK:
            os.unlink(entry.path)
    shutil.rmtree(folder)

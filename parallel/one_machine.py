"""Jobs on one machine: a private folder for their files, and network interfaces that no other machine reaches.

Imports no torch: launchers start without it.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longctx.parallel.folder_lock import abandoned, lock_folder, remove_locked

STORE = "LONGCTX_STORE"
"""Environment variable of a rank: path of the file through which the ranks of a job on one machine find each other."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
"""Environment variables that keep the sockets of collectives on the loopback interface. Without them gloo and NCCL
listen on the interface of the host's name. What the user has set takes precedence."""

_PREFIX = "longctx-"
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
        lock = lock_folder(folder, _boot_id())
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove_locked(folder)
        os.close(lock)


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
    with abandoned(folder) as boot_id:
        if boot_id == _boot_id():
            remove_locked(folder)

"""Locks of folders: whether the process that owns a folder is alive.

The lock is a file in the folder that its owner holds by flock, which ends with the owner and what it has forked.
"""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
_DRAFT = ".lock.draft"


def lock_folder(folder: Path, content: str = "") -> int:
    """Put a lock with `content` into a folder; return its descriptor, which frees it when it is closed.

    It is taken before it gets its name: another process never finds it free because it is young.
    """
    descriptor = os.open(folder / _DRAFT, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, content.encode())
        (folder / _DRAFT).rename(folder / LOCK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def abandoned(folder: Path) -> Iterator[str]:
    """Hold the lock of this user's folder whose owner is gone; yield the lock's content.

    Raises BlockingIOError if the owner is alive. If that cannot be known, raises FileNotFoundError without a lock,
    PermissionError for another user's folder, NotADirectoryError for what is not a folder, such as a link to one.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is another user's")
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), (folder / LOCK).lstat()):
            raise FileNotFoundError(f"{folder / LOCK} was replaced")  # by who removed the folder in the meantime
        yield os.read(descriptor, 4096).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


def remove_locked(folder: Path) -> None:
    """Remove a folder, its lock last: who finds what is left if this process is killed meanwhile can remove it."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != LOCK:
            os.unlink(entry.path)
    shutil.rmtree(folder)

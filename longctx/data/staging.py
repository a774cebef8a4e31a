"""Atomic output directories: written under a temporary name and renamed when complete."""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longctx.data.manifest import MANIFEST_FILE
from longctx.errors import UserError
from longctx.files import sync

_LOCK = ".lock"


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a UserError with the path and, on a full disk, the free space."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" ({_free(path)} MB free); free some space or choose another --out"
        raise UserError(f"{path}: cannot be written: {reason}; incomplete output is removed") from error


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 10**6


def resolve_target(out: Path | str, *, overwrite: bool) -> Path:
    """Return the absolute path of `out` after checking that a corpus may be written there.

    Raises UserError if it exists and is not empty, unless `overwrite` is set and it is a prepared corpus.
    """
    path = Path(out).expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise UserError(f"{path} already exists; choose another --out, or replace it with --overwrite")
        if not (path / MANIFEST_FILE).is_file():
            raise UserError(
                f"{path} is not a prepared corpus (no {MANIFEST_FILE}): it will not be replaced; choose another --out"
            )
    return path


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Create a directory beside `path` that is renamed to `path` when the block succeeds, and removed when it fails.

    Leftovers of killed runs beside `path` are removed first: a running process holds a lock on its directory. A corpus
    that is replaced is first renamed to `path.replaced-…`, because the kernel renames one directory at a time; a run
    killed between the two renames leaves it there, complete.

    Raises UserError if another run is writing `path`, or the disk cannot be written.
    """
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        lock = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield partial
        with naming_disk_errors(path):
            _sync_folders(partial)
            _replace(partial, path)
            sync(path.parent)
            # Unlock last: without the lock, another run would take the directory for a leftover.
            (path / _LOCK).unlink()
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)  # no longer there if it was renamed


def _remove_leftovers(path: Path) -> None:
    for partial in path.parent.glob(f"{_escape(path.name)}.partial-*"):
        try:
            lock = os.open(partial / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            if not any(partial.iterdir()):
                partial.rmdir()  # killed before it created its lock
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {path} (in {partial.name}); wait for it or stop it") from None
        finally:
            os.close(lock)
        shutil.rmtree(partial)


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _replace(partial: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        partial.rename(path)
        return
    old = path.with_name(f"{path.name}.replaced-{secrets.token_hex(4)}")
    path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _sync_folders(path: Path) -> None:
    for folder, _, _ in os.walk(path):
        sync(Path(folder))

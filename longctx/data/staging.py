"""A directory that is complete or absent: written aside, renamed at the end."""

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
    """Turn an OSError while writing `path` into a UserError that names it and the free space."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += f" ({_free(path)} MB free); make room or choose another --out"
        raise UserError(f"{path}: cannot be written: {reason}; nothing incomplete is left behind") from error


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 10**6


def target(out: Path | str, *, overwrite: bool) -> Path:
    """The absolute path of `out`, if something may be put there.

    Raises UserError where it exists and is not empty, unless `overwrite` and it is a prepared corpus.
    """
    path = Path(out).expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise UserError(f"{path} already exists; choose another --out, or replace it with --overwrite")
        if not (path / MANIFEST_FILE).is_file():
            raise UserError(
                f"{path} is not a prepared corpus (no {MANIFEST_FILE}): it will not be replaced; move it away"
            )
    return path


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A new directory beside `path` that takes its place when the block ends well, and vanishes when it does not.

    What dead runs left beside `path` is removed first: a run holds a lock on its directory for as long as it lives.
    The kernel renames one directory at a time, so a corpus that is replaced is first moved to `path.replaced-…`;
    killed in between, it lies there whole.

    Raises UserError where another run is preparing `path`, or the disk cannot be written.
    """
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(path)
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
            # Only now: without its lock, another run would take the directory for a dead one's.
            (path / _LOCK).unlink()
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)  # gone already when it was renamed


def _remove_dead(path: Path) -> None:
    for partial in path.parent.glob(f"{_escape(path.name)}.partial-*"):
        try:
            lock = os.open(partial / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            if not any(partial.iterdir()):
                partial.rmdir()  # killed before its lock was there
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is preparing {path} (in {partial.name}); wait for it or stop it") from None
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

"""Atomic output directories: written under a temporary name and renamed when complete."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longctx.data.manifest import MANIFEST_FILE
from longctx.errors import UserError
from longctx.files import absolute, sync
from longctx.parallel.folder_lock import LOCK, abandoned, lock_folder, remove_locked


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
    path = absolute(out)
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

    Leftovers of killed runs beside `path` are removed first: a running process holds a lock on its directories. A
    corpus that is replaced is first renamed to `path.replaced-…`, because the kernel renames one directory at a time; a
    run killed between the two renames leaves it there, complete, and the next one puts it back first.

    Raises UserError if another run is writing `path`, or the disk cannot be written.
    """
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        partial, lock = _locked_partial(path)
    try:
        yield partial
        with naming_disk_errors(path):
            _sync_folders(partial)
            _replace(partial, path)
            sync(path.parent)
            # Unlock last: without the lock, another run would take the directory for a leftover.
            (path / LOCK).unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # no longer there if it was renamed
        os.close(lock)


def _locked_partial(path: Path) -> tuple[Path, int]:
    while True:
        partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
        # FileNotFoundError: another run has taken it for a leftover before it had a lock.
        with suppress(FileNotFoundError):
            return partial, lock_folder(partial)


def _clear_leftovers(path: Path) -> None:
    for kind in ("partial", "replaced"):
        for leftover in path.parent.glob(f"{_escape(path.name)}.{kind}-*"):
            try:
                with abandoned(leftover):
                    if kind == "replaced" and not path.exists():
                        leftover.rename(path)
                        (path / LOCK).unlink()
                    else:
                        remove_locked(leftover)
            except BlockingIOError:
                raise _busy(path, leftover) from None
            except FileNotFoundError:
                with suppress(OSError):
                    leftover.rmdir()  # if it is empty: killed before it had a lock
            except (PermissionError, NotADirectoryError):
                continue  # not this user's run's


def _busy(path: Path, folder: Path) -> UserError:
    return UserError(f"another run is writing {path} (in {folder.name}); wait for it or stop it")


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _replace(partial: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        partial.rename(path)
        return
    try:
        with abandoned(path):
            pass
    except BlockingIOError:
        raise _busy(path, path) from None  # it has just written it, and has not ended yet
    except (FileNotFoundError, PermissionError):
        pass
    old = path.with_name(f"{path.name}.replaced-{secrets.token_hex(4)}")
    lock = lock_folder(path)
    try:
        path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            old.rename(path)
            (path / LOCK).unlink()
            raise
        remove_locked(old)
    finally:
        os.close(lock)


def _sync_folders(path: Path) -> None:
    for folder, _, _ in os.walk(path):
        sync(Path(folder))

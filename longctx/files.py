"""File-system helpers: durable writes, temporary folders, and errors of files and disks that a user can fix."""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from longctx.errors import UserError
from longctx.parallel.one_machine import job_folder

_OF_A_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_OF_A_DISK = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_SHOWN = 80


@contextmanager
def path_errors() -> Iterator[None]:
    """Raise an OSError of the block that only the user can fix as a UserError with the path: its name, kind, permission
    or disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_OF_A_PATH, *_OF_A_DISK) or error.filename is None:
            raise
        raise UserError(f"{shortened(os.fsdecode(error.filename))}: {error.strerror}") from error


def shortened(text: str) -> str:
    """Return a text with its end replaced by its length, if it is too long for a message."""
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}… ({len(text):,} characters)"


def absolute(path: Path | str) -> Path:
    """Return the absolute path that a user means, with `~` expanded where there is such a user."""
    return Path(os.path.expanduser(path)).resolve()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync), so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError of the block, such as of a disk that is full or read-only, as a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}. Make it writable, or choose another --out") from error


@contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Create a `job_folder` for the block. Raises UserError if it cannot be created."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(job_folder(purpose))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"no temporary folder can be created: {reason}. Set TMPDIR to a folder that can be written"
            ) from error
        yield folder

"""File-system helpers: durable writes, temporary folders, and the error of a disk that takes none."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from longctx.errors import UserError
from longctx.parallel.one_machine import job_folder


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk (fsync), so that they survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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

"""File-system helpers: durable writes, and the error of a disk that takes none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longctx.errors import UserError


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

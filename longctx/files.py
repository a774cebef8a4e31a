"""What the file system is asked for, beside reading and writing."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

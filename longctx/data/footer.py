"""Footer of a Parquet shard: its schema and where its data lies. Unlike pages, it has no checksum in the format."""

import hashlib
import os
from pathlib import Path

_MAGIC = b"PAR1"


def footer_digest(file: Path) -> str:
    """Return the SHA-256, hexadecimal, of a Parquet file's footer, with its length and the format's last bytes.

    Raises ValueError if the file does not end as Parquet does, OSError if it cannot be read.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 8))
        end = stream.read()
        length = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or length > size - 8:
            raise ValueError("it is not a complete Parquet file")
        stream.seek(size - 8 - length)
        return hashlib.sha256(stream.read()).hexdigest()

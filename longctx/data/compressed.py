"""Compressed input files: gzip, bzip2, xz and Zstandard, chosen by the suffix and decoded as a stream."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import IO, Any

import pyarrow as pa

_BUFFER = 2**18


def _zstd(raw: IO[bytes]) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


_DECODERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


class DamagedError(Exception):
    """A compressed file is truncated or damaged; the message says how."""


def split_suffixes(name: str) -> tuple[str, str]:
    """Return the suffixes of format and compression in lower case, `(".jsonl", ".gz")`; "" where there is none."""
    rest, suffix = os.path.splitext(name)
    if suffix.lower() not in _DECODERS:
        return suffix.lower(), ""
    return os.path.splitext(rest)[1].lower(), suffix.lower()


class _Decoded(io.RawIOBase):
    """The bytes that a decoder returns; whatever it raises about them becomes a DamagedError."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # read would lose what comes before an error
            data = self._decoder.read1(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the decoder
                raise
            raise DamagedError(f"cannot be unpacked after byte {self._count} of its content: {error}") from error
        buffer[: len(data)] = data
        self._count += len(data)
        return len(data)


class InputStream:
    """The decoded bytes of an open file, and how much of the file they cover."""

    def __init__(self, raw: IO[bytes], compression: str = "") -> None:
        """raw: the file, which its caller closes; compression: a suffix of `split_suffixes`, "" for none."""
        self._raw = raw
        self._compressed = bool(compression)
        self._covered = 0
        self.stream: IO[bytes] = raw
        if compression:
            self.stream = io.BufferedReader(_Decoded(_DECODERS[compression](raw)), _BUFFER)

    def covered(self, decoded: int) -> float:
        """Return the bytes of the file that the next `decoded` bytes of the stream cover, for the progress display.

        Of a compressed file, those that were read since the last call.
        """
        if not self._compressed:
            return decoded
        before, self._covered = self._covered, self._raw.tell()
        return self._covered - before

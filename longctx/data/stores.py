"""Object stores as inputs (`s3://`, `gs://`, `abfs://`), by fsspec: lists files and reads them as streams."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from longctx.errors import UserError

_BLOCK = 2**23


class Found(NamedTuple):
    """What a URL names."""

    root: str
    """The folder below which the paths of `files` are, with its scheme."""
    is_folder: bool
    files: dict[str, int]
    """Sizes in bytes by path below `root`."""
    open: Callable[[str], io.BufferedReader]
    """Opens a file by its path below `root`."""


def is_pattern(path: str) -> bool:
    """Return whether a path has wildcards."""
    return any(char in path for char in "*?[")


def folder_above(pattern: str) -> str:
    """Return the folder below which a pattern selects: its path up to the first part with a wildcard."""
    return pattern[: min(pattern.index(char) for char in "*?[" if char in pattern)].rpartition("/")[0]


def find(url: str) -> Found:
    """Return the files that `url` names: a file, a folder or a pattern.

    Raises UserError if there is none, or the store cannot be reached.
    """
    from fsspec.core import url_to_fs

    with _errors(url):
        # Without its cache of what there is: the input may have been written a moment ago.
        store, path = url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        path = path.rstrip("/")
        if is_pattern(path):
            entries, is_folder = store.glob(path, detail=True), True
            root = folder_above(path)
        elif store.isfile(path):
            entries, is_folder, root = {path: store.info(path)}, False, path.rpartition("/")[0]
        else:
            entries, is_folder, root = store.find(path, detail=True), True, path
    files = {
        name.removeprefix(root).lstrip("/"): int(entry["size"] or 0)
        for name, entry in entries.items()
        if entry["type"] == "file"
    }

    def open_file(name: str) -> io.BufferedReader:
        return io.BufferedReader(_StoredFile(store, f"{root}/{name}", store.unstrip_protocol(f"{root}/{name}")), 2**20)

    return Found(store.unstrip_protocol(root), is_folder, files, open_file)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"input {url}: no such file or folder; correct it") from error
    except ImportError as error:
        extra = "pip install -e '.[s3]'" if url.startswith("s3") else "install it"
        raise UserError(f"input {url}: the library for this store is missing ({error}): {extra}") from error
    except Exception as error:  # each store raises the errors of its own library
        raise UserError(f"input {url}: {type(error).__name__}: {error}") from error


class _StoredFile(io.RawIOBase):
    """A file of a store, read in blocks; whatever the store raises becomes a UserError."""

    def __init__(self, store: Any, path: str, url: str) -> None:
        self._url = url
        with _errors(url):
            self._file = store.open(path, "rb", block_size=_BLOCK, cache_type="readahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with _errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

"""Copies of a run's checkpoints in an object store, complete or absent there too.

An object store has no rename. What makes a copy complete is its listing, `trainer.json`, which is uploaded last, once
all other files are there in full, and removed first. fsspec reaches the store: `s3://` with s3fs, `gs://` with gcsfs,
`abfs://` with adlfs, `file://` for a folder of another file system.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from longctx.checkpoint.checksums import unseal
from longctx.checkpoint.read import TRAINER, heldout_losses, name_of, parse_name
from longctx.checkpoint.retention import RetentionPolicy
from longctx.errors import UserError

OWNER = "run.json"
"""The file beside the copies that has the id of the run which they are of."""


class CheckpointCopies:
    """The copies of one run's checkpoints. Methods raise UserError, with the URL and the reason, if the store fails.

    Used by one thread of a process at a time.
    """

    def __init__(self, url: str) -> None:
        """Open the folder `url`, which need not exist. Raises UserError if there is no file system for it."""
        self.url = url.rstrip("/")
        self.run: str | None = None
        """The id that `claim` has written."""
        with self._errors():
            # Of its own, since processes that were forked share an instance; and without its cache of what there is,
            # since other ranks write.
            self._files, self._root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        if isinstance(self._files, LocalFileSystem):
            self._files.auto_mkdir = True

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # each store raises the errors of its own library
            raise UserError(f"{self.url}: {type(error).__name__}: {error}") from error

    def _path(self, *names: str) -> str:
        return "/".join((self._root.rstrip("/"), *names))

    def _sizes(self, *names: str) -> dict[str, int | None]:
        """Return the sizes of what is in a folder, by name; nothing if there is no such folder."""
        with suppress(FileNotFoundError):
            entries = self._files.ls(self._path(*names), detail=True)
            return {entry["name"].rstrip("/").rpartition("/")[2]: entry.get("size") for entry in entries}
        return {}

    def _read(self, *names: str) -> str | None:
        with suppress(FileNotFoundError):
            return bytes(self._files.cat_file(self._path(*names))).decode()
        return None

    def _folders(self) -> list[int]:
        """Return the steps of all copies, ascending, those that are not complete among them."""
        return sorted(step for name in self._sizes() if (step := parse_name(name)) is not None)

    def _is_complete(self, step: int) -> bool:
        return bool(self._files.exists(self._path(name_of(step), TRAINER)))

    def steps(self) -> list[int]:
        """Return the steps of the complete copies, ascending."""
        with self._errors():
            return [step for step in self._folders() if self._is_complete(step)]

    def owner(self) -> str | None:
        """Return the id of the run that the copies are of; None: of none yet."""
        with self._errors():
            text = self._read(OWNER)
            return None if text is None else str(json.loads(text)["run"])

    def claim(self, run: str) -> None:
        """Make these the copies of the run with that id: a run with another one adds none any more."""
        with self._errors():
            if self.owner() != run:
                self._files.pipe_file(self._path(OWNER), json.dumps({"run": run}).encode())
        self.run = run

    def begin(self, step: int) -> None:
        """Remove what would be in the way of a copy of `step`: itself, later ones, which are of an attempt that was
        given up, and those that were never completed. Raises UserError if another run has claimed the copies."""
        if self.owner() != self.run:
            raise UserError(f"{self.url} has been claimed by another run, which was started from these copies")
        with self._errors():
            for other in self._folders():
                if other >= step or not self._is_complete(other):
                    self._remove(other)

    def upload(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Copy files of a checkpoint; its listing is not among them."""
        with self._errors():
            for name in names:
                self._files.put_file(str(checkpoint / name), self._path(checkpoint.name, name))

    def publish(self, checkpoint: Path) -> None:
        """Complete a copy by its listing. Raises UserError if a file that it lists is not there in full."""
        text = (checkpoint / TRAINER).read_text(encoding="utf-8")
        with self._errors():
            found = self._sizes(checkpoint.name)
            for name, size in unseal(text)["files"].items():
                if found.get(name) != size:
                    raise UserError(f"{self.url}/{checkpoint.name}/{name} has {found.get(name, 0)} bytes, not {size}")
            self._files.pipe_file(self._path(checkpoint.name, TRAINER), text.encode())

    def retain(self, retention: RetentionPolicy) -> None:
        """Remove the copies that are not to be kept."""
        steps = self.steps()
        with self._errors():
            # All are read before any is parsed: one that the store fails to give is not one without a loss.
            texts = {step: self._read(name_of(step), TRAINER) or "" for step in steps} if retention.sequences else {}
            for step in retention.surplus(steps, heldout_losses(texts, lambda step: unseal(texts[step]))):
                self._remove(step)

    def _remove(self, step: int) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(self._path(name_of(step), TRAINER))
        with suppress(FileNotFoundError):
            self._files.rm(self._path(name_of(step)), recursive=True)

    def listing(self, step: int) -> dict[str, Any]:
        """Return the content of a copy's listing. Raises UserError if there is none, or it is damaged."""
        with self._errors():
            text = self._read(name_of(step), TRAINER)
            if text is None:
                raise UserError(f"{self.url}/{name_of(step)} has no {TRAINER}: it is no complete copy")
            listing = unseal(text)
            if any(Path(name).name != name for name in listing["files"]):
                raise UserError(f"{self.url}/{name_of(step)}: {TRAINER} lists files outside of the checkpoint")
            return listing

    def download(self, step: int, names: Iterable[str], folder: Path) -> None:
        """Copy files of a complete copy into an existing folder."""
        with self._errors():
            for name in names:
                self._files.get_file(self._path(name_of(step), name), str(folder / name))

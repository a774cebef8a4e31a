"""Repositories of the Hugging Face Hub: their names, their commits, and their files as data, by huggingface_hub.

Only files are read: no code of a repository is run. huggingface_hub keeps downloads in its cache (`HF_HUB_CACHE`),
checks their sizes, and sends the user's token (`HF_TOKEN`, `hf auth login`) if there is one.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote

from longctx.errors import UserError

Result = TypeVar("Result")

_PART = r"[A-Za-z0-9_][\w.-]*"
_NAME = re.compile(rf"{_PART}/{_PART}", re.ASCII)
# Of revisions with a slash in a URL only these occur; any other is written with %2F.
_REVISION = r"refs/(?:convert|pr)/[^/]+|[^/]+"
_DATA_SET = re.compile(rf"hf://datasets/({_PART}/{_PART})(?:@({_REVISION}))?(?:/(.*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30.0
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UnreachableError(UserError):
    """The Hub gives no answer, or may not be asked (`HF_HUB_OFFLINE`); the message is the reason."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of the Hub."""

    kind: Literal["model", "dataset"]
    name: str
    """`OWNER/NAME`."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    def commit(self) -> str:
        """Ask the Hub for the commit of `revision`: 40 hexadecimal digits.

        Raises UnreachableError, or UserError if there is no such repository or revision, or this user may not see it.
        """

        def ask() -> str:
            from huggingface_hub import HfApi

            info = HfApi().repo_info(self.name, revision=self.revision, repo_type=self.kind, timeout=_TIMEOUT)
            return str(info.sha)

        return self._answer(ask)

    def list(self, path: str, commit: str) -> dict[str, int] | None:
        """Return the sizes in bytes, by path, of the files below a folder ("": all); None if `path` is not a folder.

        Raises UserError as `commit` does.
        """

        def ask() -> dict[str, int] | None:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import EntryNotFoundError
            from huggingface_hub.hf_api import RepoFile

            try:
                entries = HfApi().list_repo_tree(
                    self.name, path or None, recursive=True, revision=commit, repo_type=self.kind
                )
                return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
            except EntryNotFoundError:
                return None

        return self._answer(ask)

    def size(self, path: str, commit: str) -> int | None:
        """Return the size of a file in bytes; None if there is no such file. Raises UserError as `commit` does."""

        def ask() -> int | None:
            from huggingface_hub import HfApi
            from huggingface_hub.hf_api import RepoFile

            entries = HfApi().get_paths_info(self.name, [path], revision=commit, repo_type=self.kind)
            return next((entry.size for entry in entries if isinstance(entry, RepoFile)), None)

        return self._answer(ask)

    def check(self, path: str, commit: str) -> None:
        """Raise UserError if this user may not read a file: what a gated repository has may be listed by everybody."""

        def ask() -> None:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url

            get_hf_file_metadata(hf_hub_url(self.name, path, repo_type=self.kind, revision=commit), timeout=_TIMEOUT)

        self._answer(ask)

    def fetch(self, path: str, revision: str | None, *, cached: bool = False) -> Path | None:
        """Return the local copy of a file, downloaded unless the cache has it; None if the repository has no such file.

        cached: do not ask the Hub. None then says that the cache does not have it.

        Raises UserError as `commit` does.
        """
        if ".." in path.split("/"):
            raise UserError(f"{path} leads out of the repository {self.name}; leave it out")

        def ask() -> Path | None:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

            try:
                with _without_bars():
                    return Path(
                        hf_hub_download(
                            self.name, path, repo_type=self.kind, revision=revision, local_files_only=cached
                        )
                    )
            except LocalEntryNotFoundError as error:
                if cached:
                    return None
                raise (error.__cause__ or error) from None
            except EntryNotFoundError:
                return None

        return self._answer(ask)

    def _answer(self, ask: Callable[[], Result]) -> Result:
        from huggingface_hub import HfApi, errors

        page = f"{HfApi().endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"
        try:
            return ask()
        except errors.GatedRepoError as error:
            raise UserError(
                f"{self.name} is gated: accept its terms at {page}, and log in with `hf auth login` or HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            kind = "data set" if self.kind == "dataset" else "model"
            raise UserError(
                f"the Hub has no {kind} {self.name}, or it is private: correct the name, or log in with "
                f"`hf auth login` or HF_TOKEN as a user who may read it"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise UserError(
                f"{self.name} has no revision {self.revision!r}: name a branch, a tag or a commit of {page}"
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise UnreachableError("HF_HUB_OFFLINE is set") from error
        except errors.HFValidationError as error:
            raise UserError(f"{self.name} is no name of a repository: {error}") from error
        except Exception as error:  # the errors of requests, httpx or httpx2, as huggingface_hub's version has it
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise UserError(
                    f"the cache of the Hub, {cache()}, cannot be written: {error.strerror}; make room there, or set "
                    f"HF_HUB_CACHE to another directory"
                ) from error
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UnreachableError(f"the Hub gives no answer ({page}: {reason})") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub's own bars off the terminal, which shows the progress of the preparation."""
    from huggingface_hub import utils  # its types leave out the functions that its documentation names

    if utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]


def cache() -> str:
    """Return the directory of huggingface_hub's downloads."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is the full name of a commit, which never changes."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def parse_model(text: str) -> Repository | None:
    """Return the repository that `OWNER/NAME[@REVISION]` names, with `hf://` or without; None if it is not such a name.

    Raises UserError for an `hf://` that names no model.
    """
    name, at, revision = text.removeprefix("hf://").partition("@")
    if _NAME.fullmatch(name) and not name.endswith(".json") and (revision or not at):
        return Repository("model", name, revision or None)
    if text.startswith("hf://"):
        raise UserError(f"{text}: names no repository of the Hub; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return None


def parse_data_set(text: str) -> tuple[Repository, str]:
    """Return the repository and the path in it ("": all of it) of `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.

    Raises UserError for anything else.
    """
    match = _DATA_SET.fullmatch(text)
    if match is None:
        raise UserError(
            f"input {text}: names no data set of the Hub; write hf://datasets/OWNER/NAME[@REVISION][/PATH], "
            f"where PATH is a file, a folder or a pattern such as data/train-*.parquet"
        )
    name, revision, path = match.groups()
    return Repository("dataset", name, revision and unquote(revision)), (path or "").strip("/")

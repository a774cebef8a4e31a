"""Files of the inputs of `longctx data prepare`: of this machine, of data sets of the Hub, and of object stores.

Within folders, hidden files and folders (a leading dot) are ignored, links to folders are not followed, and every other
file is read unless `suffixes` or `exclude` leaves it out: nothing is guessed from a name. Repositories of the Hub have
other files too (a README, code, pictures): without `suffixes`, only those whose suffix is one of data are read there.
"""

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate

from fsspec.utils import glob_translate

from longctx.data.compressed import split_suffixes
from longctx.data.hub import Repository, UnreachableError, is_commit, parse_data_set
from longctx.data.stores import find, folder_above, is_pattern
from longctx.errors import UserError
from longctx.files import shortened

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".txt")


@dataclass(frozen=True, slots=True)
class BadInput:
    """An input that cannot be read; it also invalidates the item that it interrupts."""

    where: str
    kind: str
    detail: str
    size: float = 0.0


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read."""

    path: str
    """Path or URL, for messages."""
    name: str
    """Name of the input and the path below it: the same on every machine."""
    size: int
    fetch: Callable[[], str | io.BufferedReader] | None = None
    """Returns the path of a local copy, or the open file; None: `path` is a file of this machine."""


@dataclass
class Source:
    """An input and its files."""

    path: str
    """Absolute path, or URL."""
    name: str
    is_folder: bool
    commit: str | None = None
    """Commit of a data set of the Hub."""
    files: list[SourceFile] = field(default_factory=list)
    bad_inputs: list[BadInput] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files and folders ignored, by reason."""

    @property
    def is_local(self) -> bool:
        """Whether the input is on this machine."""
        return not _URL.match(self.path)


def discover(inputs: Sequence[str], suffixes: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Source]:
    """Return each input with its files, sorted by name. Within folders, `suffixes` (empty: all) and `exclude` (patterns
    that match a path below the input or any name in it) select the files; an input that is a file is always read, and
    so are all files that the pattern of a URL matches.

    Raises UserError if an input is missing, occurs twice, or has no selected file, or if the Hub or a store cannot be
    reached.
    """
    if not inputs:
        raise UserError("nothing to prepare: name at least one file or folder")
    if bad := [suffix for suffix in suffixes if not suffix.startswith(".")]:
        raise UserError(f"suffix {bad[0]!r} has no dot: write {'.' + bad[0]!r}")
    sources = [_discover_one(path, suffixes, exclude) for path in inputs]
    owners: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            if file.path in owners:
                raise UserError(
                    f"{file.path} would be prepared twice, by the inputs {owners[file.path]} and {source.path}; "
                    f"leave one of them out"
                )
            owners[file.path] = source.path
    return sources


def _discover_one(path: str, suffixes: Sequence[str], exclude: Sequence[str]) -> Source:
    if path.startswith("hf://"):
        return _of_hub(path, suffixes, exclude)
    if web := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([^/]+/[^/?#]+)", path):
        raise UserError(f"input {path}: is a web page; write hf://datasets/{web[1]}")
    if _URL.match(path):
        return _of_store(path, suffixes, exclude)
    return _of_machine(os.path.abspath(os.path.expanduser(path)), suffixes, exclude)


def _of_machine(path: str, suffixes: Sequence[str], exclude: Sequence[str]) -> Source:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(
            f"input {shortened(path)}: {error.strerror}; name a file or a folder that can be read"
        ) from None
    except ValueError as error:  # a NUL character
        raise UserError(f"input {path!r}: {error}; name a file or a folder that can be read") from None
    source = Source(path, printable_name(os.path.basename(path) or "root"), stat.S_ISDIR(mode))
    if not source.is_folder:
        _add(source, path, source.name)
        return source

    def unreadable(error: OSError) -> None:
        source.bad_inputs.append(
            BadInput(printable_name(str(error.filename)), "unreadable", error.strerror or str(error))
        )

    for folder, folders, files in os.walk(path, onerror=unreadable):
        below = os.path.relpath(folder, path)

        def keep(name: str, is_file: bool, below: str = below) -> bool:
            reason = _ignored_because(os.path.normpath(os.path.join(below, name)), is_file, suffixes, exclude)
            if reason:
                source.passed_over[reason] += 1
            return reason is None

        folders[:] = [name for name in folders if keep(name, False)]
        source.passed_over["link to a folder"] += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for name in files:
            if keep(name, True):
                file = os.path.join(folder, name)
                _add(source, file, f"{source.name}/{printable_name(os.path.relpath(file, path))}")
    return _finish(source)


def _finish(source: Source) -> Source:
    source.passed_over = +source.passed_over  # without zeros
    source.files.sort(key=lambda file: file.name)
    source.bad_inputs.sort(key=lambda bad: bad.where)
    if not source.files and not source.bad_inputs:
        reasons = ", ".join(f"{count} ignored: {reason}" for reason, count in source.passed_over.items())
        raise UserError(f"input {source.path}: has no file to prepare ({reasons or 'an empty folder'})")
    return source


def _of_hub(url: str, suffixes: Sequence[str], exclude: Sequence[str]) -> Source:
    """Return the files of a data set of the Hub at the commit that its revision names now, downloaded as they are read.

    Without an answer of the Hub, a file that is named with its commit is taken from the cache.
    """
    repository, path = parse_data_set(url)

    def fetch(commit: str, file: str) -> str:
        try:
            local = repository.fetch(file, commit)
        except UserError as error:
            raise UserError(f"input {url}: {file}: {error}; what has been downloaded stays in the cache") from error
        if local is None:
            raise UserError(f"input {url}: {file} is not in commit {commit} of {repository.name}; prepare it again")
        return str(local)

    try:
        commit = repository.commit()
        is_folder, files = _list_data_set(repository, path, commit)
        for file in list(files)[:1]:
            repository.check(file, commit)  # now, not when other inputs have been prepared
    except UnreachableError as error:
        pinned = is_commit(repository.revision) and path and not is_pattern(path)
        local = repository.fetch(path, repository.revision, cached=True) if pinned else None
        if local is None or not local.is_file():
            raise UserError(
                f"input {url}: {error}. Only a file that is named with its commit can then be read, from the cache: "
                f"hf://datasets/{repository.name}@COMMIT/FILE"
            ) from error
        commit, is_folder, files = str(repository.revision), False, {path: local.stat().st_size}
    except UserError as error:
        raise UserError(f"input {url}: {error}") from error
    source = Source(url, f"{repository.name}/{path}".rstrip("/"), is_folder, commit)
    if not files:
        raise UserError(f"input {url}: {repository.name} has no such file or folder at commit {commit}; correct it")
    selected = is_folder and not is_pattern(path)
    skip = f"{path}/" if selected and path else ""
    for file, size in files.items():
        reason = _ignored_below(file.removeprefix(skip), suffixes, exclude, _DATA_SUFFIXES) if selected else None
        if reason:
            source.passed_over[reason] += 1
            continue
        label = f"hf://datasets/{repository.name}@{commit}/{file}"
        name = printable_name(f"{repository.name}/{file}")
        source.files.append(SourceFile(label, name, size, partial(fetch, commit, file)))
    return _finish(source)


def _list_data_set(repository: Repository, path: str, commit: str) -> tuple[bool, Mapping[str, int]]:
    """Return whether a path is no single file, and the sizes of the files that it names, by their paths."""
    if is_pattern(path):
        matches = re.compile(glob_translate(path))
        listed = repository.list(folder_above(path), commit) or {}
        return True, {file: size for file, size in listed.items() if matches.match(file)}
    size = repository.size(path, commit) if path else None
    if size is not None:
        return False, {path: size}
    return True, repository.list(path, commit) or {}


def _of_store(url: str, suffixes: Sequence[str], exclude: Sequence[str]) -> Source:
    """Return the files of an object store, which are read as streams."""
    found = find(url)
    name = printable_name(url.rstrip("/").rpartition("/")[2])
    source = Source(url, name, found.is_folder)
    for file, size in found.files.items():
        selected = found.is_folder and not is_pattern(url)
        if reason := _ignored_below(file, suffixes, exclude) if selected else None:
            source.passed_over[reason] += 1
            continue
        below = f"{name}/{file}" if selected else file
        opened = partial(found.open, file)
        source.files.append(SourceFile(f"{found.root}/{file}", printable_name(below), size, opened))
    return _finish(source)


def _ignored_below(
    path: str, suffixes: Sequence[str], exclude: Sequence[str], expected: Sequence[str] = ()
) -> str | None:
    """Say why a file of a folder of another machine is ignored, by its path below the folder; None: it is read.

    expected: the formats that are read if `suffixes` is empty; empty: all.
    """
    *folders, _ = accumulate(path.split("/"), "{}/{}".format)
    for folder in folders:
        if reason := _ignored_because(folder, False, suffixes, exclude):
            return reason
    if reason := _ignored_because(path, True, suffixes, exclude):
        return reason
    if expected and not suffixes and split_suffixes(path)[0] not in expected:
        return "not a file of data"
    return None


def _ignored_because(relative: str, is_file: bool, suffixes: Sequence[str], exclude: Sequence[str]) -> str | None:
    name = os.path.basename(relative)
    if name.startswith("."):
        return "hidden"
    if any(fnmatchcase(name, pattern) or fnmatchcase(relative, pattern) for pattern in exclude):
        return "excluded"
    if is_file and suffixes and not name.endswith(tuple(suffixes)):
        return "other suffix"
    return None


def _add(source: Source, path: str, name: str) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        source.bad_inputs.append(BadInput(printable_name(path), "unreadable", error.strerror or str(error)))
        return
    if stat.S_ISREG(status.st_mode):
        source.files.append(SourceFile(path, name, status.st_size))
    else:  # opening a pipe or a device could block
        source.bad_inputs.append(BadInput(printable_name(path), "unreadable", "not a regular file"))


def printable_name(name: str) -> str:
    """Return a file name as text; bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")

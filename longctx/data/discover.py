"""Files of the inputs of `longctx data prepare`.

Within folders, hidden files and folders (a leading dot) are ignored, links to folders are not followed, and every other
file is read unless `suffixes` or `exclude` leaves it out: nothing is guessed from a name.
"""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from longctx.errors import UserError
from longctx.files import shortened


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
    name: str
    """Name of the input and the path below it: the same on every machine."""
    size: int


@dataclass
class Source:
    """An input and its files."""

    path: str
    name: str
    is_folder: bool
    files: list[SourceFile] = field(default_factory=list)
    bad_inputs: list[BadInput] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Number of files and folders ignored, by reason."""


def discover(inputs: Sequence[str], suffixes: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Source]:
    """Return each input with its files, sorted by name. Within folders, `suffixes` (empty: all) and `exclude` (patterns
    that match a path below the input or any name in it) select the files; an input that is a file is always read.

    Raises UserError if an input is missing, occurs twice, or has no selected file.
    """
    if not inputs:
        raise UserError("nothing to prepare: name at least one file or folder")
    if bad := [suffix for suffix in suffixes if not suffix.startswith(".")]:
        raise UserError(f"suffix {bad[0]!r} has no dot: write {'.' + bad[0]!r}")
    sources = [_discover_one(os.path.abspath(os.path.expanduser(path)), suffixes, exclude) for path in inputs]
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

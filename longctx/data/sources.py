"""What is prepared: which files the inputs name, and their texts as a stream of events at bounded memory.

The suffix says how a file is read: `.jsonl` and `.ndjson` hold an object a line, `.parquet` a row a document, anything
else is text. In a folder, hidden files and folders (a leading dot) are passed over, links to folders are not followed,
and every other file is read unless `suffixes` or `exclude` says otherwise: nothing is guessed from a name.
"""

import io
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from longctx.data.encode import Job, pieces
from longctx.errors import UserError

Join = Literal["none", "folder"]

_LONGEST_LINE = 2**30
_PARQUET_BATCH_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an item: of a file, a line or a row. A document is one item, or all items of a joined folder."""

    where: str
    job: Job
    last: bool
    size: float
    """Bytes of the input that this piece stands for: the measure of progress."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Bad input, which also spoils the item that it interrupts."""

    where: str
    kind: str
    detail: str
    size: float = 0.0


@dataclass(frozen=True, slots=True)
class EndOfDocument:
    """All items of a document have been given."""

    source: str


Event = Piece | Problem | EndOfDocument


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read."""

    path: str
    name: str
    """The input's own name and the path below it: the same on every machine."""
    size: int


@dataclass
class Source:
    """An input and what it holds."""

    path: str
    name: str
    is_folder: bool
    files: list[SourceFile] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Files and folders left out, by reason."""


def discover(inputs: Sequence[str], suffixes: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Source]:
    """The files of each input in the order of their names. Within folders, `suffixes` (empty: all) and `exclude`
    (patterns that match a path below the input or any one name in it) choose; a file that is named itself is taken.

    Raises UserError where an input is missing, comes twice, or holds nothing that is chosen.
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
        raise UserError(f"input {path}: {error.strerror}; name a file or a folder that can be read") from None
    source = Source(path, _printable(os.path.basename(path) or "root"), stat.S_ISDIR(mode))
    if not source.is_folder:
        _add(source, path, source.name)
        return source

    def unreadable(error: OSError) -> None:
        source.problems.append(Problem(_printable(str(error.filename)), "unreadable", error.strerror or str(error)))

    for folder, folders, files in os.walk(path, onerror=unreadable):
        below = os.path.relpath(folder, path)

        def keep(name: str, is_file: bool, below: str = below) -> bool:
            reason = _passed_over(os.path.normpath(os.path.join(below, name)), is_file, suffixes, exclude)
            if reason:
                source.passed_over[reason] += 1
            return reason is None

        folders[:] = [name for name in folders if keep(name, False)]
        source.passed_over["link to a folder"] += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for name in files:
            if keep(name, True):
                file = os.path.join(folder, name)
                _add(source, file, f"{source.name}/{_printable(os.path.relpath(file, path))}")
    source.passed_over = +source.passed_over  # without zeros
    source.files.sort(key=lambda file: file.name)
    source.problems.sort(key=lambda problem: problem.where)
    if not source.files and not source.problems:
        reasons = ", ".join(f"{count} passed over: {reason}" for reason, count in source.passed_over.items())
        raise UserError(f"input {path}: holds no file to prepare ({reasons or 'an empty folder'})")
    return source


def _passed_over(relative: str, is_file: bool, suffixes: Sequence[str], exclude: Sequence[str]) -> str | None:
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
        source.problems.append(Problem(_printable(path), "unreadable", error.strerror or str(error)))
        return
    if stat.S_ISREG(status.st_mode):
        source.files.append(SourceFile(path, name, status.st_size))
    else:  # opening a pipe or a device might wait for ever
        source.problems.append(Problem(_printable(path), "unreadable", "not a regular file"))


def _printable(name: str) -> str:
    """A file name that is no UTF-8, as text that can be stored."""
    return os.fsencode(name).decode(errors="backslashreplace")


def read(source: Source, *, join: Join, column: str) -> Iterator[Event]:
    """The input's pieces, problems and ends of documents, in order.

    With `join="folder"` a folder is one document: its items in order, each after a line `==> name <==` and before a
    blank line, as `tail` shows several files.
    """
    yield from source.problems
    joined = source.is_folder and join == "folder"
    for file in source.files:
        suffix = os.path.splitext(file.path)[1].lower()
        reader = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}.get(suffix, _text)
        for event in reader(file, joined, column):
            if not (joined and isinstance(event, EndOfDocument)):
                yield event
    if joined:
        yield EndOfDocument(source.name)


def _frame(name: str, joined: bool) -> tuple[bytes, bytes]:
    """What stands before and after an item."""
    return (f"==> {name} <==\n".encode(), b"\n") if joined else (b"", b"")


def _text(file: SourceFile, joined: bool, column: str) -> Iterator[Event]:
    header, footer = _frame(file.name, joined)
    where = _printable(file.path)
    try:
        with open(file.path, "rb") as stream:
            yield from _pieces_of(where, stream, header, footer)
    except OSError as error:
        yield Problem(where, "unreadable", error.strerror or str(error), file.size)
    yield EndOfDocument(file.name)


def _pieces_of(
    where: str, stream: io.BufferedIOBase, header: bytes = b"", footer: bytes = b"", size: float | None = None
) -> Iterator[Event]:
    """A text's pieces; `size` is what the whole stands for, by default its length."""
    before, offset = b"", -len(header)
    framed = False

    def read_framed(count: int) -> bytes:
        nonlocal framed
        if framed:
            return stream.read(count)
        framed = True
        return header + stream.read(max(0, count - len(header)))

    for data in pieces(read_framed):
        if before:
            yield Piece(where, Job(before, offset), False, len(before) if size is None else 0)
            offset += len(before)
        before = data
    if offset + len(before) == 0:
        yield Problem(where, "empty", "holds no text")
    else:
        yield Piece(where, Job(before + footer, offset), True, len(before) if size is None else size)


def _json_lines(file: SourceFile, joined: bool, column: str) -> Iterator[Event]:
    """An object a line; blank lines are no documents."""
    path = _printable(file.path)
    number = documents = 0
    try:
        with open(file.path, "rb") as stream:
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                where = f"{path}, line {number}"
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    yield Problem(where, "line too long", f"over {_LONGEST_LINE} bytes; is it JSON lines?", len(line))
                    while (rest := stream.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                elif line.strip():
                    name = f"{file.name}:{number}"
                    job = Job(line, 0, column, *_frame(name, joined))
                    yield Piece(where, job, True, len(line))
                    yield EndOfDocument(name)
                else:
                    continue
                documents += 1
    except OSError as error:
        yield Problem(path, "unreadable", error.strerror or str(error))
    else:
        if not documents:
            yield Problem(path, "empty", "holds no line")


def _parquet(file: SourceFile, joined: bool, column: str) -> Iterator[Event]:
    path = _printable(file.path)
    row = 0
    try:
        # A buffer, not whole column chunks: a row group of another writer may hold gigabytes.
        with pq.ParquetFile(file.path, buffer_size=2**20, pre_buffer=False) as parquet:
            schema = parquet.schema_arrow
            index = schema.get_field_index(column)
            if index < 0:
                names = ", ".join(map(repr, schema.names))
                yield Problem(
                    path, "missing column", f"no {column!r}; it has {names}; name one with --column", file.size
                )
                return
            if not _is_text(schema.types[index]):
                yield Problem(path, "not text", f"column {column!r} is {schema.types[index]}", file.size)
                return
            metadata = parquet.metadata
            if metadata.num_rows == 0:
                yield Problem(path, "empty", "holds no row", file.size)
                return
            groups = range(metadata.num_row_groups)
            row_bytes = sum(metadata.row_group(group).total_byte_size for group in groups) // metadata.num_rows
            rows = min(4096, max(1, _PARQUET_BATCH_BYTES // max(1, row_bytes)))
            for batch in parquet.iter_batches(rows, columns=[column], use_threads=False):
                for text in _as_bytes(batch.column(0)):
                    row += 1
                    yield from _row(file, row, text, joined, column, file.size / metadata.num_rows)
    except (FileNotFoundError, PermissionError) as error:
        yield Problem(path, "unreadable", os.strerror(error.errno) if error.errno else str(error))
    except (OSError, pa.ArrowException) as error:
        lost = f"cannot be read after row {row}: " if row else ""
        yield Problem(path, "truncated or not Parquet", lost + str(error).strip().split("\n")[0])


def _row(file: SourceFile, row: int, text: bytes | None, joined: bool, column: str, size: float) -> Iterator[Event]:
    where = f"{_printable(file.path)}, row {row}"
    name = f"{file.name}:{row}"
    if text is None:
        yield Problem(where, "not text", f"{column!r} is null", size)
    else:
        yield from _pieces_of(where, io.BytesIO(text), *_frame(name, joined), size=size)
    yield EndOfDocument(name)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Writers without annotations leave strings as binary; their UTF-8 is checked like any other.
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    )


def _as_bytes(column: pa.Array) -> Iterator[bytes | None]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for value in column.cast(pa.large_binary()):
        yield value.as_py()

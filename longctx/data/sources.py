"""Input files of `longctx data prepare`: finds them and reads their texts as a stream of events, at bounded memory.

The suffix selects the reader: `.jsonl` and `.ndjson` files have one JSON object per line, `.parquet` files one document
per row, all others are text. Within folders, hidden files and folders (a leading dot) are ignored, links to folders are
not followed, and every other file is read unless `suffixes` or `exclude` leaves it out: nothing is guessed from a name.
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

from longctx.data.encode import EncodeJob, split_text
from longctx.errors import UserError
from longctx.files import shortened

Join = Literal["none", "folder"]

_LONGEST_LINE = 2**30
_PARQUET_BATCH_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of an item, which is a file, a line or a row. A document is one item, or all items of a joined folder."""

    where: str
    job: EncodeJob
    last: bool
    size: float
    """Bytes of input that this piece covers, for the progress display."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """An input that cannot be read; it also invalidates the item that it interrupts."""

    where: str
    kind: str
    detail: str
    size: float = 0.0


@dataclass(frozen=True, slots=True)
class EndOfDocument:
    """The end of a document, after its last item."""

    source: str


Event = TextPiece | BadInput | EndOfDocument


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
    source = Source(path, _printable(os.path.basename(path) or "root"), stat.S_ISDIR(mode))
    if not source.is_folder:
        _add(source, path, source.name)
        return source

    def unreadable(error: OSError) -> None:
        source.bad_inputs.append(BadInput(_printable(str(error.filename)), "unreadable", error.strerror or str(error)))

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
                _add(source, file, f"{source.name}/{_printable(os.path.relpath(file, path))}")
    source.passed_over = +source.passed_over  # without zeros
    source.files.sort(key=lambda file: file.name)
    source.bad_inputs.sort(key=lambda bad: bad.where)
    if not source.files and not source.bad_inputs:
        reasons = ", ".join(f"{count} ignored: {reason}" for reason, count in source.passed_over.items())
        raise UserError(f"input {path}: has no file to prepare ({reasons or 'an empty folder'})")
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
        source.bad_inputs.append(BadInput(_printable(path), "unreadable", error.strerror or str(error)))
        return
    if stat.S_ISREG(status.st_mode):
        source.files.append(SourceFile(path, name, status.st_size))
    else:  # opening a pipe or a device could block
        source.bad_inputs.append(BadInput(_printable(path), "unreadable", "not a regular file"))


def _printable(name: str) -> str:
    """Return a file name as text; bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def read_events(source: Source, *, join: Join, column: str) -> Iterator[Event]:
    """Yield the pieces, bad inputs and document ends of an input, in order.

    With `join="folder"` a folder is one document: its items in order, each between a line `==> name <==` and a blank
    line, in the format of `tail` for several files.
    """
    yield from source.bad_inputs
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
    """Return the header and footer of an item."""
    return (f"==> {name} <==\n".encode(), b"\n") if joined else (b"", b"")


def _text(file: SourceFile, joined: bool, column: str) -> Iterator[Event]:
    header, footer = _frame(file.name, joined)
    where = _printable(file.path)
    try:
        with open(file.path, "rb") as stream:
            yield from _text_pieces(where, stream, header, footer)
    except OSError as error:
        yield BadInput(where, "unreadable", error.strerror or str(error), file.size)
    yield EndOfDocument(file.name)


def _text_pieces(
    where: str, stream: io.BufferedIOBase, header: bytes = b"", footer: bytes = b"", size: float | None = None
) -> Iterator[Event]:
    """Yield the pieces of one item; `size` is the bytes of input that the item covers, by default its length."""
    before, offset = b"", -len(header)
    framed = False

    def read_framed(count: int) -> bytes:
        nonlocal framed
        if framed:
            return stream.read(count)
        framed = True
        return header + stream.read(max(0, count - len(header)))

    for data in split_text(read_framed):
        if before:
            yield TextPiece(where, EncodeJob(before, offset), False, len(before) if size is None else 0)
            offset += len(before)
        before = data
    if offset + len(before) == 0:
        yield BadInput(where, "empty", "has no text")
    else:
        yield TextPiece(where, EncodeJob(before + footer, offset), True, len(before) if size is None else size)


def _json_lines(file: SourceFile, joined: bool, column: str) -> Iterator[Event]:
    """Read one document per line, a JSON object; blank lines are skipped."""
    path = _printable(file.path)
    number = documents = 0
    try:
        with open(file.path, "rb") as stream:
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                where = f"{path}, line {number}"
                if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    yield BadInput(
                        where, "line too long", f"over {_LONGEST_LINE} bytes; is it a JSON lines file?", len(line)
                    )
                    while (rest := stream.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                elif line.strip():
                    name = f"{file.name}:{number}"
                    job = EncodeJob(line, 0, column, *_frame(name, joined))
                    yield TextPiece(where, job, True, len(line))
                    yield EndOfDocument(name)
                else:
                    continue
                documents += 1
    except OSError as error:
        yield BadInput(path, "unreadable", error.strerror or str(error))
    else:
        if not documents:
            yield BadInput(path, "empty", "has no line")


def _parquet(file: SourceFile, joined: bool, column: str) -> Iterator[Event]:
    path = _printable(file.path)
    row = 0
    try:
        # A buffer instead of whole column chunks: a row group of another writer may have gigabytes.
        with pq.ParquetFile(file.path, buffer_size=2**20, pre_buffer=False) as parquet:
            schema = parquet.schema_arrow
            index = schema.get_field_index(column)
            if index < 0:
                names = ", ".join(map(repr, schema.names))
                yield BadInput(
                    path,
                    "missing column",
                    f"no {column!r}; the columns are {names}; choose one with --column",
                    file.size,
                )
                return
            if not _is_text(schema.types[index]):
                yield BadInput(path, "not text", f"column {column!r} is {schema.types[index]}", file.size)
                return
            metadata = parquet.metadata
            if metadata.num_rows == 0:
                yield BadInput(path, "empty", "has no row", file.size)
                return
            groups = range(metadata.num_row_groups)
            row_bytes = sum(metadata.row_group(group).total_byte_size for group in groups) // metadata.num_rows
            rows = min(4096, max(1, _PARQUET_BATCH_BYTES // max(1, row_bytes)))
            for batch in parquet.iter_batches(rows, columns=[column], use_threads=False):
                for text in _as_bytes(batch.column(0)):
                    row += 1
                    yield from _row(file, row, text, joined, column, file.size / metadata.num_rows)
    except (FileNotFoundError, PermissionError) as error:
        yield BadInput(path, "unreadable", os.strerror(error.errno) if error.errno else str(error))
    except (OSError, pa.ArrowException) as error:
        position = f"cannot be read after row {row}: " if row else ""
        yield BadInput(path, "truncated or not Parquet", position + str(error).strip().split("\n")[0])


def _row(file: SourceFile, row: int, text: bytes | None, joined: bool, column: str, size: float) -> Iterator[Event]:
    where = f"{_printable(file.path)}, row {row}"
    name = f"{file.name}:{row}"
    if text is None:
        yield BadInput(where, "not text", f"{column!r} is null", size)
    else:
        yield from _text_pieces(where, io.BytesIO(text), *_frame(name, joined), size=size)
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

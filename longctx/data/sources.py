"""Input files of `longctx data prepare`, read as a stream of events, at bounded memory.

The suffix selects the reader: `.jsonl` and `.ndjson` files have one JSON object per line, `.parquet` files one document
per row, all others are text. A suffix of a compression may follow (`longctx.data.compressed`).
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from longctx.data.compressed import DamagedError, InputStream, split_suffixes
from longctx.data.discover import BadInput, Source, SourceFile, printable_name
from longctx.data.encode import EncodeJob, split_text

Join = Literal["none", "folder"]

_LONGEST_LINE = 2**30
_PARQUET_BATCH_BYTES = 2**22
_NOT_COMPRESSED = {".parquet": "is Parquet, which has a compression of its own,", ".tar": "is an archive"}
"""Formats that are not read as a compressed stream, and what they are."""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of an item, which is a file, a line or a row. A document is one item, or all items of a joined folder."""

    where: str
    job: EncodeJob
    last: bool
    size: float
    """Bytes of input that this piece covers, for the progress display."""


@dataclass(frozen=True, slots=True)
class EndOfDocument:
    """The end of a document, after its last item."""

    source: str


Event = TextPiece | BadInput | EndOfDocument


def read_events(
    source: Source, *, join: Join, column: str, announce: Callable[[str], None] = lambda name: None
) -> Iterator[Event]:
    """Yield the pieces, bad inputs and document ends of an input, in order.

    With `join="folder"` a folder is one document: its items in order, each between a line `==> name <==` and a blank
    line, in the format of `tail` for several files. `announce` is called with "fetching NAME" before each
    file of another machine, and with "" when it is here.

    Raises UserError, whatever is skipped otherwise, if a file cannot be fetched: the network is not the input's fault.
    """
    yield from source.bad_inputs
    joined = source.is_folder and join == "folder"
    for file in source.files:
        for event in _read(file, joined, column, announce):
            if not (joined and isinstance(event, EndOfDocument)):
                yield event
    if joined:
        yield EndOfDocument(source.name)


def _read(file: SourceFile, joined: bool, column: str, announce: Callable[[str], None]) -> Iterator[Event]:
    format_, compression = split_suffixes(file.path)
    where = printable_name(file.path)
    if compression and format_ in _NOT_COMPRESSED:
        yield BadInput(where, "unreadable", f"{_NOT_COMPRESSED[format_]} in {compression}: unpack it first", file.size)
        return
    opened: str | io.BufferedReader = file.path
    if file.fetch is not None:
        announce(f"fetching {file.name}")
        opened = file.fetch()
        announce("")
    if format_ == ".parquet":
        with nullcontext(opened) if isinstance(opened, str) else opened as place:
            yield from _parquet(file, place, joined, column)
        return
    reader = _json_lines if format_ in (".jsonl", ".ndjson") else _text
    try:
        with open(opened, "rb") if isinstance(opened, str) else opened as raw:
            yield from reader(file, InputStream(raw, compression), joined, column)
    except OSError as error:
        yield BadInput(where, "unreadable", error.strerror or str(error), file.size)
    except DamagedError as error:
        yield BadInput(where, "truncated or damaged", str(error))


def _frame(name: str, joined: bool) -> tuple[bytes, bytes]:
    """Return the header and footer of an item."""
    return (f"==> {name} <==\n".encode(), b"\n") if joined else (b"", b"")


def _text(file: SourceFile, source: InputStream, joined: bool, column: str) -> Iterator[Event]:
    where = printable_name(file.path)
    yield from _text_pieces(where, source.stream.read, source.covered, *_frame(file.name, joined))
    yield EndOfDocument(file.name)


def _text_pieces(
    where: str,
    read: Callable[[int], bytes],
    covered: Callable[[int], float],
    header: bytes = b"",
    footer: bytes = b"",
) -> Iterator[Event]:
    """Yield the pieces of one item; `covered` returns the bytes of input that bytes of the item cover."""
    before, offset = b"", -len(header)

    def size() -> float:
        return covered(len(before) + min(0, offset))  # without the header

    framed = False

    def read_framed(count: int) -> bytes:
        nonlocal framed
        if framed:
            return read(count)
        framed = True
        return header + read(max(0, count - len(header)))

    for data in split_text(read_framed):
        if before:
            yield TextPiece(where, EncodeJob(before, offset), False, size())
            offset += len(before)
        before = data
    if offset + len(before) == 0:
        yield BadInput(where, "empty", "has no text")
    else:
        yield TextPiece(where, EncodeJob(before + footer, offset), True, size())


def _json_lines(file: SourceFile, source: InputStream, joined: bool, column: str) -> Iterator[Event]:
    """Read one document per line, a JSON object; blank lines are skipped."""
    path = printable_name(file.path)
    number = documents = 0
    while line := source.stream.readline(_LONGEST_LINE):
        number += 1
        where = f"{path}, line {number}"
        size = source.covered(len(line))
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            yield BadInput(where, "line too long", f"over {_LONGEST_LINE} bytes; is it a JSON lines file?", size)
            while (rest := source.stream.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
        elif line.strip():
            name = f"{file.name}:{number}"
            yield TextPiece(where, EncodeJob(line, 0, column, *_frame(name, joined)), True, size)
            yield EndOfDocument(name)
        else:
            continue
        documents += 1
    if not documents:
        yield BadInput(path, "empty", "has no line")


def _parquet(file: SourceFile, opened: str | io.BufferedReader, joined: bool, column: str) -> Iterator[Event]:
    path = printable_name(file.path)
    row = 0
    try:
        # A buffer instead of whole column chunks: a row group of another writer may have gigabytes.
        with pq.ParquetFile(opened, buffer_size=2**20, pre_buffer=False) as parquet:
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
    where = f"{printable_name(file.path)}, row {row}"
    name = f"{file.name}:{row}"
    if text is None:
        yield BadInput(where, "not text", f"{column!r} is null", size)
    else:

        def covered(count: int) -> float:
            return size * (count / len(text))

        yield from _text_pieces(where, io.BytesIO(text).read, covered, *_frame(name, joined))
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

"""Input files: the events that they are read as."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longctx.data import encode
from longctx.data.discover import BadInput, discover
from longctx.data.encode import EncodeJob
from longctx.data.sources import EndOfDocument, TextPiece, read_events
from tests.data.cases import write_lines, write_parquet, write_tree


def events(path, join="none", column="text"):
    (source,) = discover([str(path)])
    return list(read_events(source, join=join, column=column))


def bad(path, **options):
    """(place below the path, kind, detail) of bad inputs."""
    found = (event for event in events(path, **options) if isinstance(event, BadInput))
    return [(event.where.removeprefix(str(path)), event.kind, event.detail) for event in found]


def test_a_text_file_is_read_in_pieces_with_their_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "PIECE_BYTES", 16)
    path = write_tree(tmp_path, {"a.txt": "0123456789\nabcdefghij"}) / "a.txt"
    assert events(path) == [
        TextPiece(str(path), EncodeJob(b"0123456789\n", 0), False, 11),
        TextPiece(str(path), EncodeJob(b"abcdefghij", 11), True, 10),
        EndOfDocument("a.txt"),
    ]


def test_an_empty_file_is_a_bad_input(tmp_path):
    path = write_tree(tmp_path, {"a.txt": ""}) / "a.txt"
    assert events(path) == [BadInput(str(path), "empty", "has no text"), EndOfDocument("a.txt")]


def test_a_joined_folder_is_one_document_with_a_header_per_item(tmp_path):
    folder = write_tree(tmp_path / "in", {"b": "two", "a": "one"})
    pieces = events(folder, join="folder")
    assert [event.job.data for event in pieces[:-1]] == [b"==> in/a <==\none\n", b"==> in/b <==\ntwo\n"]
    # Offsets are those in the file, without the header.
    assert pieces[0].job.offset == -len(b"==> in/a <==\n")
    assert pieces[-1] == EndOfDocument("in")


def test_a_joined_file_stays_a_document_without_a_header(tmp_path):
    path = write_tree(tmp_path, {"a.txt": "one"}) / "a.txt"
    assert events(path, join="folder") == events(path)


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "JSONL"])
def test_json_lines_are_documents_and_blank_lines_are_skipped(tmp_path, suffix):
    path = write_lines(tmp_path / f"l.{suffix}", [{"text": "a"}, b"  ", {"text": "b"}])
    got = events(path)
    assert [(event.where, event.job.column) for event in got[::2]] == [
        (f"{path}, line 1", "text"),
        (f"{path}, line 3", "text"),
    ]
    assert got[1::2] == [EndOfDocument(f"l.{suffix}:1"), EndOfDocument(f"l.{suffix}:3")]


def test_json_lines_without_a_line_are_a_bad_input(tmp_path):
    assert bad(write_lines(tmp_path / "l.jsonl", [b"", b" "])) == [("", "empty", "has no line")]


def test_rows_of_parquet_are_documents_and_their_sizes_add_up_to_the_file(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", ["one", "zwölf"], "body")
    got = events(path, column="body")
    assert [event.job.data.decode() for event in got[::2]] == ["one", "zwölf"]
    assert got[1::2] == [EndOfDocument("p.parquet:1"), EndOfDocument("p.parquet:2")]
    assert sum(event.size for event in got[::2]) == path.stat().st_size


def test_dictionaries_and_binary_columns_are_text(tmp_path):
    kinds = {
        "a": pa.array(["x", "y"]).dictionary_encode(),
        "b": pa.array([b"x", b"y"]),
        "c": pa.array(["x", "y"], pa.large_string()),
    }
    pq.write_table(pa.table(kinds), tmp_path / "p.parquet")
    for column in kinds:
        pieces = [event.job.data for event in events(tmp_path / "p.parquet", column=column)[::2]]
        assert pieces == [b"x", b"y"]


def test_parquet_without_text_is_a_bad_input(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"n": pa.array([1, 2], pa.int64())}), path)
    missing = "no 'text'; the columns are 'n'; choose one with --column"
    assert bad(path) == [("", "missing column", missing)]
    assert bad(path, column="n") == [("", "not text", "column 'n' is int64")]
    assert bad(write_parquet(path, [])) == [("", "empty", "has no row")]
    assert bad(write_parquet(path, ["a", None, ""])) == [
        (", row 2", "not text", "'text' is null"),
        (", row 3", "empty", "has no text"),
    ]
    path.write_bytes(path.read_bytes()[:-5])
    assert [kind for _, kind, _ in bad(path)] == ["truncated or not Parquet"]

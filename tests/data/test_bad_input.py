"""Bad input is named and counted; preparation stops at it or skips it, as asked."""

import bz2
import gzip
import json
import lzma
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longctx.data import encode, sources
from longctx.errors import UserError
from tests.data.cases import prepared, texts, write_lines, write_parquet, write_tree


def invalid_utf8(folder):
    (folder / "bad.txt").write_bytes(b"fine\xff")
    return "bad.txt", "invalid UTF-8", "byte 4 is 0xff"


def late_invalid_utf8(folder):
    (folder / "bad.txt").write_bytes(b"a line\n" * 10 + b"\xff" + b"a line\n" * 10 + b"\xff")
    return "bad.txt", "invalid UTF-8", "byte 70 is 0xff"


def empty_file(folder):
    (folder / "bad.txt").touch()
    return "bad.txt", "empty", "no text"


def unreadable_file(folder):
    (folder / "bad.txt").symlink_to("nowhere")
    return "bad.txt", "unreadable", "No such file"


def pipe(folder):
    os.mkfifo(folder / "bad.txt")
    return "bad.txt", "unreadable", "not a regular file"


def line_that_is_not_json(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, b'{"text": '])
    return "bad.jsonl, line 2", "not JSON", "Expecting value"


def line_too_deep(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, b"[" * 100_000])
    return "bad.jsonl, line 2", "not JSON", "recursion"


def line_without_the_column(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, {"body": "x"}])
    return "bad.jsonl, line 2", "missing column", "no 'text': the line is an object with 'body'"


def line_that_is_no_object(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, ["text"]])
    return "bad.jsonl, line 2", "missing column", "not an object"


def line_whose_text_is_a_number(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, {"text": 7}])
    return "bad.jsonl, line 2", "not text", "int, not a string"


def line_whose_text_is_empty(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, {"text": ""}])
    return "bad.jsonl, line 2", "empty", "'text' is empty"


def line_with_half_a_surrogate_pair(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, b'{"text": "ab\\ud800"}'])
    return "bad.jsonl, line 2", "invalid UTF-8", "character 2"


def line_too_long(folder):
    write_lines(folder / "bad.jsonl", [{"text": "fine"}, {"text": "x" * 5000}])
    return "bad.jsonl, line 2", "line too long", "4096 bytes"


def file_without_lines(folder):
    (folder / "bad.jsonl").write_text("\n\n")
    return "bad.jsonl", "empty", "no line"


def truncated_parquet(folder):
    path = write_parquet(folder / "bad.parquet", ["fine"])
    path.write_bytes(path.read_bytes()[:-10])
    return "bad.parquet", "truncated or not Parquet", "magic bytes"


def parquet_damaged_inside(folder):
    path = write_parquet(folder / "bad.parquet", ["fine", "x" * 1000], row_group_size=1, compression="none")
    content = path.read_bytes()
    # The page's header, before its text: the row before it is read, this one is not.
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    path.write_bytes(content[:place] + b"\xff" * 16 + content[place + 16 :])
    return "bad.parquet", "truncated or not Parquet", "after row 1"


def parquet_without_the_column(folder):
    write_parquet(folder / "bad.parquet", ["x"], column="body")
    return "bad.parquet", "missing column", "no 'text'; the columns are 'body'"


def parquet_of_numbers(folder):
    pq.write_table(pa.table({"text": [1, 2]}), folder / "bad.parquet")
    return "bad.parquet", "not text", "column 'text' is int64"


def parquet_with_a_null(folder):
    write_parquet(folder / "bad.parquet", ["fine", None])
    return "bad.parquet, row 2", "not text", "null"


def parquet_with_an_empty_text(folder):
    write_parquet(folder / "bad.parquet", ["fine", ""])
    return "bad.parquet, row 2", "empty", "no text"


def parquet_with_invalid_utf8(folder):
    pq.write_table(pa.table({"text": pa.array([b"fine", b"\xc3"])}), folder / "bad.parquet")
    return "bad.parquet, row 2", "invalid UTF-8", "byte 0 is 0xc3"


def parquet_without_rows(folder):
    write_parquet(folder / "bad.parquet", [])
    return "bad.parquet", "empty", "no row"


def truncated_text(folder):
    (folder / "bad.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(1000).hex().encode())[:-20])
    return "bad.txt.gz", "truncated or damaged", "cannot be unpacked after byte"


def damaged_json_lines(folder):
    """Their first stream is whole, and so is its line."""
    lines = write_lines(folder / "bad.jsonl.bz2", [{"text": "fine"}])
    lines.write_bytes(bz2.compress(lines.read_bytes()) + bz2.compress(b"{}")[:-20])
    return "bad.jsonl.bz2", "truncated or damaged", "cannot be unpacked after byte 17 of its content"


def compressed_text_that_is_not(folder):
    (folder / "bad.txt.zst").write_text("text")
    return "bad.txt.zst", "truncated or damaged", "after byte 0"


def compressed_parquet(folder):
    (folder / "bad.parquet.gz").write_bytes(gzip.compress(b"x"))
    return "bad.parquet.gz", "unreadable", "is Parquet, which has a compression of its own, in .gz: unpack it first"


def compressed_archive(folder):
    (folder / "bad.tar.xz").write_bytes(lzma.compress(b"x"))
    return "bad.tar.xz", "unreadable", "is an archive in .xz: unpack it first"


BAD = [
    invalid_utf8,
    late_invalid_utf8,
    empty_file,
    unreadable_file,
    pipe,
    line_that_is_not_json,
    line_too_deep,
    line_without_the_column,
    line_that_is_no_object,
    line_whose_text_is_a_number,
    line_whose_text_is_empty,
    line_with_half_a_surrogate_pair,
    line_too_long,
    file_without_lines,
    truncated_parquet,
    parquet_damaged_inside,
    parquet_without_the_column,
    parquet_of_numbers,
    parquet_with_a_null,
    parquet_with_an_empty_text,
    parquet_with_invalid_utf8,
    parquet_without_rows,
    truncated_text,
    damaged_json_lines,
    compressed_text_that_is_not,
    compressed_parquet,
    compressed_archive,
]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("join", ["none", "folder"])
def test_bad_input(tmp_path, monkeypatch, bad, join):
    monkeypatch.setattr(encode, "PIECE_BYTES", 16)
    monkeypatch.setattr(sources, "_LONGEST_LINE", 4096 if bad is line_too_long else 2**20)
    monkeypatch.setattr(sources, "_PARQUET_BATCH_BYTES", 1)
    folder = write_tree(tmp_path / "in", {"a.txt": "before", "z.txt": "after"})
    where, kind, detail = bad(folder)

    with pytest.raises(UserError) as error:
        prepared([folder], tmp_path / "out", join=join)
    assert f"{folder / where}: {kind}: " in str(error.value)
    assert detail in str(error.value)
    assert "--on-error skip" in str(error.value)
    assert os.listdir(tmp_path) == ["in"]

    manifest = prepared([folder], tmp_path / "out", join=join, on_error="skip")
    assert manifest.errors == {kind: 1}
    (named,) = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert (named["where"], named["kind"]) == (str(folder / where), kind)
    assert detail in named["detail"]
    found = texts(tmp_path / "out")
    if join == "none":
        names = list(found)
        assert (names[0], names[-1]) == ("in/a.txt", "in/z.txt")
        assert set(found.values()) <= {"before", "fine", "after"}
    else:
        # Only what is bad is missing from the long document.
        items = [item.split(" <==\n") for item in found["in"].split("==> ")[1:]]
        assert items[0] == ["in/a.txt", "before\n"]
        assert items[-1] == ["in/z.txt", "after\n"]
        assert all(text == "fine\n" for _, text in items[1:-1])


def test_nothing_but_bad_input_is_an_error(tmp_path):
    folder = write_tree(tmp_path / "in", {"a": b"\xff", "b": "", "c": ""})
    with pytest.raises(UserError, match="no document: 2 empty, 1 invalid UTF-8"):
        prepared([folder], tmp_path / "out", on_error="skip")
    assert os.listdir(tmp_path) == ["in"]


def test_good_input_leaves_no_list_of_errors(tmp_path):
    manifest = prepared([write_tree(tmp_path / "in", {"a": "text"})], tmp_path / "out", on_error="skip")
    assert manifest.errors == {}
    assert not (tmp_path / "out" / "errors.jsonl").exists()

"""Tokenisation: pieces of a text, tokens in order, and faults instead of tokens."""

import io
import json

import numpy as np
import pytest

from longctx.data import encode
from longctx.data.encode import EncodeJob, Encoder, Fault, encode_in_order, split_text
from longctx.data.tokenizer import ByteTokenizer

ENCODER = Encoder(ByteTokenizer())


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(encode, "PIECE_BYTES", 16)


def pieces(data):
    return list(split_text(io.BytesIO(data).read))


def line(value, **options):
    return EncodeJob(json.dumps(value).encode(), column="text", **options)


@pytest.mark.parametrize(
    "data", [b"", b"a", b"x" * 15, b"x" * 16, b"x" * 100, b"ab\n" * 30, "zwölf €\n🙂".encode() * 9]
)
def test_pieces_join_to_the_text_and_are_short(data):
    assert b"".join(pieces(data)) == data
    assert all(0 < len(piece) <= 16 for piece in pieces(data))


def test_a_text_is_split_after_the_last_line_break_of_a_piece():
    assert pieces(b"one\ntwo\nthree four five six") == [b"one\ntwo\n", b"three four five", b" six"]


@pytest.mark.parametrize("character", ["é", "€", "🙂"])
def test_no_character_is_split(character):
    for shift in range(4):
        text = "a" * shift + character * 20
        assert "".join(piece.decode() for piece in pieces(text.encode())) == text


def test_bytes_without_a_character_are_split_all_the_same():
    assert b"".join(pieces(b"\x80" * 40)) == b"\x80" * 40
    assert len(pieces(b"\x80" * 40)) == 3


def test_tokens_of_all_jobs_are_concatenated_with_their_numbers():
    tokens, results = ENCODER([EncodeJob(b"ab"), line({"text": "cde"}), EncodeJob(b"")])
    assert tokens.tolist() == list(b"abcde")
    assert tokens.dtype == np.uint16
    assert results == [2, 3, 0]


def test_no_job_has_no_tokens():
    tokens, results = ENCODER([])
    assert (tokens.tolist(), tokens.dtype, results) == ([], np.uint16, [])


def test_a_long_json_text_is_tokenised_in_pieces_with_its_header_and_footer():
    tokens, results = ENCODER([line({"text": "ö" * 30}, header=b"==> a <==\n", footer=b"\n")])
    assert bytes(tokens.tolist()).decode() == "==> a <==\n" + "ö" * 30 + "\n"
    assert results == [71]


@pytest.mark.parametrize(
    ("job", "kind", "detail"),
    [
        (EncodeJob(b"ab\xffc", offset=100), "invalid UTF-8", "byte 102 is 0xff"),
        (EncodeJob(b"{", column="text"), "not JSON", "Expecting property name"),
        (EncodeJob(b"[" * 100_000, column="text"), "not JSON", "recursion"),
        (line([1]), "missing column", "no 'text': the line is not an object"),
        (line({}), "missing column", "no 'text': the line is an object with no keys"),
        (line({"a": 1, "b": 2}), "missing column", "no 'text': the line is an object with 'a', 'b'"),
        (line({"text": 3}), "not text", "'text' is int, not a string"),
        (line({"text": None}), "not text", "'text' is NoneType, not a string"),
        (line({"text": ""}), "empty", "'text' is empty"),
        (line({"text": "a\ud800"}), "invalid UTF-8", "character 1 of 'text' is half of a surrogate pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_job_without_tokens_has_a_fault_and_harms_no_other(job, kind, detail):
    tokens, (before, fault, after) = ENCODER([EncodeJob(b"a"), job, EncodeJob(b"bc")])
    assert tokens.tolist() == list(b"abc")
    assert (before, after) == (1, 2)
    assert isinstance(fault, Fault)
    assert fault.kind == kind
    assert detail in fault.detail


def test_one_worker_encodes_batches_in_order_as_they_are_read():
    read = []

    def batches():
        for text in (b"ab", b"c", b"def"):
            read.append(text)
            yield text

    results = encode_in_order(batches(), lambda text: [EncodeJob(text)], tokenizer="bytes", eos=None, workers=1)
    batch, tokens, counts = next(results)
    assert (batch, tokens.tolist(), counts) == (b"ab", list(b"ab"), [2])
    assert read == [b"ab"]
    assert [(batch, tokens.tolist()) for batch, tokens, _ in results] == [(b"c", list(b"c")), (b"def", list(b"def"))]

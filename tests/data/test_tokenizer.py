"""Tokenizers: what they must hold, and how an end token is found."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.data.tokenizer import ByteTokenizer, open_tokenizer, token_dtype
from longctx.errors import UserError
from tests.data.cases import write_tokenizer


@given(st.text())
def test_bytes_decode_to_the_text(text):
    tokenizer = open_tokenizer("bytes")
    (tokens,) = tokenizer.encode_batch([text])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == list(text.encode())
    assert tokenizer.decode([*tokens, tokenizer.eos_id]) == text


def test_the_smallest_type_holds_the_vocabulary():
    assert token_dtype(ByteTokenizer.vocab_size) is np.uint16
    assert token_dtype(2**16) is np.uint16
    assert token_dtype(2**16 + 1) is np.uint32


def test_bytes_refuse_an_end_token():
    with pytest.raises(UserError, match="--eos"):
        open_tokenizer("bytes", "</s>")


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path / "fox" / "tokenizer.json").parent


def test_a_tokenizer_json_encodes_and_decodes(folder):
    tokenizer = open_tokenizer(str(folder))
    text = "the quick fox\njumps — naïvely"
    (tokens,) = tokenizer.encode_batch([text])
    assert tokens.dtype == np.uint16
    assert len(tokens) < len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.name == "fox"
    assert tokenizer.vocab_size > tokens.max()
    assert tokenizer.fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_text_that_spells_the_end_token_does_not_end_the_document(folder):
    tokenizer = open_tokenizer(str(folder / "tokenizer.json"))
    (tokens,) = tokenizer.encode_batch(["a <|endoftext|> b"])
    assert tokenizer.eos_id not in tokens
    assert tokenizer.decode(tokens) == "a <|endoftext|> b"


def test_stored_truncation_and_padding_are_set_aside(tmp_path):
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "tokenizer.json", truncation=8)))
    long, short = tokenizer.encode_batch(["dog " * 100, "a"])
    assert tokenizer.decode(long) == "dog " * 100
    assert len(short) == 1


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]"])
def test_the_end_token_is_found(tmp_path, end):
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path / "tokenizer.json", end=end)))
    assert tokenizer.eos == end
    assert tokenizer.decode([tokenizer.eos_id]) == end


def test_no_end_token_is_an_error_that_eos_mends(tmp_path):
    path = str(write_tokenizer(tmp_path / "tokenizer.json", end=None))
    with pytest.raises(UserError, match=r"no end-of-document token found.*--eos"):
        open_tokenizer(path)
    with pytest.raises(UserError, match="no token '<stop>'"):
        open_tokenizer(path, "<stop>")
    assert open_tokenizer(path, "!").eos == "!"


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer 'gpt\\x002': embedded null byte; use 'bytes'"):
        open_tokenizer("gpt\x002")
    with pytest.raises(UserError, match=r"gpt2.*No such file.*tokenizer\.json"):
        open_tokenizer("gpt2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a Hugging Face tokenizer\.json"):
        open_tokenizer(str(tmp_path))

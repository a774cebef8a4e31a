"""Tokenizers: what they must hold, and how an end token is found."""

import hashlib

import numpy as np
import pytest
from huggingface_hub import constants
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


def write_config(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    return folder


@pytest.mark.parametrize("named", ['"<|stop|>"', '{"content": "<|stop|>", "lstrip": false}'])
def test_an_end_token_of_another_spelling_is_that_of_tokenizer_config(tmp_path, named):
    folder = write_tokenizer(tmp_path / "tokenizer.json", end="<|stop|>").parent
    write_config(folder, f'{{"eos_token": {named}}}')
    assert open_tokenizer(str(folder)).eos == "<|stop|>"
    assert open_tokenizer(str(folder / "tokenizer.json")).eos == "<|stop|>"
    assert open_tokenizer(str(folder), "!").eos == "!"
    write_config(folder, '{"eos_token": "<none>"}')
    with pytest.raises(UserError, match="has no token '<none>'; name its end-of-document token with --eos"):
        open_tokenizer(str(folder))


def test_the_end_of_a_turn_is_taken_only_where_no_end_of_documents_is_known(tmp_path):
    """Of chat models tokenizer_config.json names the end of a turn."""
    base = write_tokenizer(tmp_path / "base" / "tokenizer.json", end="<|endoftext|>").parent
    assert open_tokenizer(str(write_config(base, '{"eos_token": "!"}'))).eos == "<|endoftext|>"
    chat = write_tokenizer(tmp_path / "chat" / "tokenizer.json", end="<|im_end|>").parent
    assert open_tokenizer(str(chat)).eos == "<|im_end|>"
    assert open_tokenizer(str(write_config(chat, '{"eos_token": "!"}'))).eos == "!"
    assert open_tokenizer(str(write_config(chat, '{"eos_token": null}'))).eos == "<|im_end|>"


@pytest.mark.parametrize("content", ["no json", "[" * 100_000, '"\xff"'])
def test_a_damaged_tokenizer_config_is_named(tmp_path, content):
    folder = write_tokenizer(tmp_path / "tokenizer.json", end="<|stop|>").parent
    (folder / "tokenizer_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read: .*--eos"):
        open_tokenizer(str(folder))


@pytest.fixture
def stop(tmp_path):
    """Files of a repository whose end token only its tokenizer_config.json names."""
    tokenizer = write_tokenizer(tmp_path / "stop" / "tokenizer.json", end="<|stop|>").read_bytes()
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": '{"eos_token": "<|stop|>"}', "code.py": "1/0"}


def test_a_tokenizer_of_the_hub_has_its_commit_and_the_ids_of_its_file(hub, stop, tmp_path):
    commit = hub.push("own/stop", stop)
    local = open_tokenizer(str(tmp_path / "stop"), "<|stop|>")
    for spec in ("own/stop", "hf://own/stop", "own/stop@main", f"own/stop@{commit}"):
        tokenizer = open_tokenizer(spec)
        assert (tokenizer.name, tokenizer.commit, tokenizer.eos) == ("own/stop", commit, "<|stop|>")
        assert tokenizer.fingerprint == local.fingerprint
    assert local.commit is None
    assert not any("code.py" in request for request in hub.requests)


def test_a_path_that_exists_comes_before_the_hub(hub, stop, tmp_path, monkeypatch):
    hub.push("own/fox", stop)
    monkeypatch.chdir(tmp_path)
    write_tokenizer(tmp_path / "own" / "fox" / "tokenizer.json")
    assert open_tokenizer("own/fox").commit is None
    assert hub.requests == []
    assert open_tokenizer("hf://own/fox").commit is not None


@pytest.mark.parametrize("gone", ["offline", "unreachable"])
def test_without_a_hub_the_cache_gives_the_same_tokenizer(hub, stop, monkeypatch, gone):
    commit = hub.push("own/stop", stop)
    online = open_tokenizer("own/stop")
    hub.push("own/more", {"tokenizer.json": stop["tokenizer.json"]})
    with pytest.raises(UserError, match="no end-of-document token"):
        open_tokenizer("own/more")
    if gone == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        reason = "HF_HUB_OFFLINE is set"
    else:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        reason = "the Hub gives no answer"
    again = open_tokenizer("own/stop")
    assert (again.commit, again.eos, again.fingerprint) == (commit, online.eos, online.fingerprint)
    with pytest.raises(UserError, match=f"^tokenizer 'own/fox': there is no such file here, and {reason}.*the cache /"):
        open_tokenizer("own/fox")
    with pytest.raises(UserError, match=f"^tokenizer 'own/more': {reason}.* tokenizer_config.json, .*--eos"):
        open_tokenizer("own/more")
    assert open_tokenizer("own/more", "<|stop|>").eos == "<|stop|>"


def test_what_is_wrong_with_a_repository_is_named_with_what_to_do(hub, stop):
    hub.push("own/slow", {"tokenizer.model": "x"})
    with pytest.raises(
        UserError, match=r"'own/slow': the repository has no tokenizer.json; make one with transformers"
    ):
        open_tokenizer("own/slow")
    with pytest.raises(UserError, match=r"^tokenizer 'own/none': there is no such file here, and the Hub has no model"):
        open_tokenizer("own/none")
    with pytest.raises(UserError, match=r"^tokenizer 'hf://own/none': the Hub has no model own/none"):
        open_tokenizer("hf://own/none")
    with pytest.raises(UserError, match=r"is a web page; write own/slow"):
        open_tokenizer("https://huggingface.co/own/slow/tree/main")
    hub.push("own/stop", stop)
    hub.gated.add("own/stop")
    with pytest.raises(UserError, match=r"^tokenizer 'own/stop': own/stop is gated"):
        open_tokenizer("own/stop")
    hub.gated.clear()
    hub.push("own/stop", {"tokenizer.json": "{}"})
    with pytest.raises(UserError, match=r"not a Hugging Face tokenizer.json"):
        open_tokenizer("own/stop")

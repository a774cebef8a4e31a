"""Text from tokens that come one by one."""

import pytest
import tokenizers

from longctx.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from longctx.generate.text import CONTEXT, REPLACEMENT, TextStream
from tests.data.cases import write_tokenizer

TEXT = "the quick — naïve fox ☃ jumps 🙂🙂, é"


def streamed(tokenizer, prompt, tokens):
    """What each token gives, and what the end gives."""
    stream = TextStream(tokenizer, prompt)
    return [stream.add(token) for token in tokens] + [stream.end()]


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, tmp_path):
    return ByteTokenizer() if request.param == "bytes" else HuggingFaceTokenizer(write_tokenizer(tmp_path / "t.json"))


@pytest.mark.parametrize("behind", ["", "x", "a prompt of many more tokens than are looked at, é"])
def test_pieces_are_the_text_and_characters_come_whole(tokenizer, behind):
    prompt, tokens = (tokenizer.encode_batch([text])[0].tolist() for text in (behind, TEXT))
    pieces = streamed(tokenizer, prompt, tokens)
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[-1] == ""
    # Nothing waits longer than it has to: a token that ends a character gives it.
    assert sum(map(bool, pieces)) >= len(tokens) - TEXT.encode().count(b"\xf0") * 3 - 10


def test_bytes_that_are_no_character_come_as_unknown_ones():
    assert streamed(ByteTokenizer(), [], [0xC3, 0x61, 0xFF, 0xFF, 0x62]) == [
        "",
        REPLACEMENT + "a",
        "",
        "",
        2 * REPLACEMENT + "b",
        "",
    ]
    assert streamed(ByteTokenizer(), [], [0x61, 0xE2, 0x98]) == ["a", "", "", REPLACEMENT]


def test_a_token_without_text_gives_none():
    assert streamed(ByteTokenizer(), [0x61], [256, 0x62]) == ["", "b", ""]


class Words:
    """As tokenizers of words with a mark for a space before them: at the very beginning it is left out."""

    def decode(self, tokens):
        self.most = max(getattr(self, "most", 0), len(tokens))
        return " ".join(f"w{token}" for token in tokens)


def test_a_leading_space_is_not_lost():
    assert streamed(Words(), [1], [2, 3]) == [" w2", " w3", ""]
    metaspace = tokenizers.decoders.Metaspace()
    assert metaspace.decode(["▁a", "▁b"]) == "a b"  # what `Words` stands for


def test_what_is_decoded_does_not_grow_with_the_text():
    words = Words()
    pieces = streamed(words, list(range(100)), range(300))
    assert "".join(pieces) == "".join(f" w{n}" for n in range(300))
    assert words.most <= CONTEXT + 1

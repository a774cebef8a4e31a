"""Tokenizers: bytes, or any Hugging Face `tokenizer.json`.

Ids are numpy arrays of the smallest type that holds the vocabulary, never Python lists of a document's length.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from longctx.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
"""uint16 or uint32."""

# In this order: the token that a base model saw at the end of its documents comes before one that ends a chat's turn.
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # DeepSeek's spelling, with full-width bars
    "<|im_end|>",
    "[SEP]",
)


class Tokenizer(Protocol):
    """What preparation and inspection need of a tokenizer."""

    @property
    def name(self) -> str:
        """`bytes`, or the name of the file's folder."""

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows that an embedding needs."""

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every document."""

    @property
    def eos(self) -> str | None:
        """That token as it is spelled; None where it has no spelling."""

    @property
    def file(self) -> Path | None:
        """The `tokenizer.json`; None for bytes."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of what defines the ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text, 1-D, without an end token; `token_dtype(vocab_size)`."""

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids [n]; bytes that are no UTF-8 appear as U+FFFD."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """The type in which ids below `vocab_size` are stored."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ByteTokenizer:
    """A byte is a token: ids 0–255, and 256 at the end of a document, which decodes to nothing."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    eos = None
    file = None
    fingerprint = hashlib.sha256(b"longctx bytes: UTF-8, 256 ends a document").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """UTF-8 of each text as uint16 [bytes]."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids [n]; bytes that are no UTF-8 appear as U+FFFD."""
        ids = np.asarray(tokens)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json`, without what concerns single requests: its truncation, padding and template are set aside."""

    def __init__(self, path: Path, eos: str | None = None) -> None:
        """Read `path` (a file, or a folder that holds `tokenizer.json`); `eos` names the end token, else it is found.

        Raises UserError where the file cannot be read or no end token is known.
        """
        import tokenizers  # here, so that the bytes tokenizer needs none of it

        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"tokenizer {str(path)!r}: {error.strerror}; give 'bytes' or the path of a Hugging Face tokenizer.json"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
            raise UserError(f"{path}: not a Hugging Face tokenizer.json: {error}") from None
        # A stored truncation would silently cut documents at some 512 tokens, and text that merely spells a special
        # token must not end a document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.file = path
        self.name = path.parent.resolve().name if path.name == "tokenizer.json" else path.stem
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos = eos or self._find_eos()
        found = self._tokenizer.token_to_id(self.eos)
        if found is None:
            raise UserError(f"{path}: has no token {eos!r}; name the one that ends a document with --eos")
        self.eos_id = int(found)

    def _find_eos(self) -> str:
        # Only special tokens count: a vocabulary of HTML may well hold an ordinary "</s>".
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        for candidate in _END_TOKENS:
            if candidate in special:
                return candidate
        raise UserError(
            f"{self.file}: no end-of-document token found (looked for {', '.join(_END_TOKENS)} among its "
            f"special tokens); name the one to use with --eos"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Ids of each text, 1-D, without special tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays: list[Tokens] = [np.array(encoding.ids, token_dtype(self.vocab_size)) for encoding in encodings]
        return arrays

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Text of ids [n], special tokens included."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False))


def open_tokenizer(spec: str, eos: str | None = None) -> ByteTokenizer | HuggingFaceTokenizer:
    """`bytes`, or the path of a Hugging Face `tokenizer.json` or of its folder; `eos` names its end token.

    Raises UserError where there is no such file, it is no tokenizer, or no end token is found.
    """
    if spec != "bytes":
        return HuggingFaceTokenizer(Path(spec), eos)
    if eos is not None:
        raise UserError(f"--eos {eos!r}: the bytes tokenizer has its own end token, 256; leave --eos out")
    return ByteTokenizer()

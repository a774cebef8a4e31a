"""Tokenizers: bytes, or any Hugging Face `tokenizer.json`.

Ids are numpy arrays of the smallest type that fits the vocabulary, never Python lists of a document's length.
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

# Ordered: the end-of-document token of base models precedes end-of-turn tokens of chat models.
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
    """Interface of the tokenizers for preparation and inspection."""

    @property
    def name(self) -> str:
        """`bytes`, or the name of the folder of `tokenizer.json`."""

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows of an embedding."""

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every document."""

    @property
    def eos(self) -> str | None:
        """Spelling of the end token; None if it has none."""

    @property
    def file(self) -> Path | None:
        """The `tokenizer.json`; None for bytes."""

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the definition of the ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text, 1-D, without an end token; dtype `token_dtype(vocab_size)`."""

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Return the text of ids [n]; bytes that are not UTF-8 become U+FFFD."""


def token_dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    """Return the dtype that stores ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class ByteTokenizer:
    """Byte tokenizer: ids 0 to 255, and 256 as the end token, which decodes to nothing."""

    name = "bytes"
    vocab_size = 257
    eos_id = 256
    eos = None
    file = None
    fingerprint = hashlib.sha256(b"longctx bytes: UTF-8, 256 ends a document").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the UTF-8 bytes of each text, uint16 [bytes]."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Return the text of ids [n]; bytes that are not UTF-8 become U+FFFD."""
        ids = np.asarray(tokens)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`; its truncation, padding and template are disabled."""

    def __init__(self, path: Path, eos: str | None = None) -> None:
        """Read `path` (a `tokenizer.json` or its folder); `eos` names the end token, which is detected if None.

        Raises UserError if the file cannot be read or no end token is found.
        """
        import tokenizers  # imported here, so that the bytes tokenizer does not need it

        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL character
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"tokenizer {str(path)!r}: {reason}; use 'bytes' or the path of a Hugging Face tokenizer.json"
            ) from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
            raise UserError(f"{path}: not a Hugging Face tokenizer.json: {error}") from None
        # A stored truncation would silently cut documents at, say, 512 tokens, and text that happens to spell a special
        # token must not end a document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.file = path
        self.name = path.parent.resolve().name if path.name == "tokenizer.json" else path.stem
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos = eos or self._find_eos()
        eos_id = self._tokenizer.token_to_id(self.eos)
        if eos_id is None:
            raise UserError(f"{path}: has no token {eos!r}; name its end-of-document token with --eos")
        self.eos_id = int(eos_id)

    def _find_eos(self) -> str:
        # Only special tokens: a vocabulary trained on HTML may have an ordinary token "</s>".
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        for candidate in _END_TOKENS:
            if candidate in special:
                return candidate
        raise UserError(
            f"{self.file}: no end-of-document token found (none of {', '.join(_END_TOKENS)} is a special token); "
            f"name the one to use with --eos"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text, 1-D, without special tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays: list[Tokens] = [np.array(encoding.ids, token_dtype(self.vocab_size)) for encoding in encodings]
        return arrays

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Return the text of ids [n], including special tokens."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False))


def open_tokenizer(spec: str, eos: str | None = None) -> ByteTokenizer | HuggingFaceTokenizer:
    """Open `bytes`, or a Hugging Face `tokenizer.json` by its path or folder; `eos` names its end token.

    Raises UserError if the file does not exist, is not a tokenizer, or has no known end token.
    """
    if spec != "bytes":
        return HuggingFaceTokenizer(Path(spec), eos)
    if eos is not None:
        raise UserError(f"--eos {eos!r}: the bytes tokenizer has its own end token, 256; remove --eos")
    return ByteTokenizer()

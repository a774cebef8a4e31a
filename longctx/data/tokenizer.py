"""Tokenizers: bytes, or any Hugging Face `tokenizer.json`, of this machine or of the Hub.

Ids are numpy arrays of the smallest type that fits the vocabulary, never Python lists of a document's length.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from longctx.data.hub import Repository, UnreachableError, cache, parse_model
from longctx.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger[Any]]
"""uint16 or uint32."""

# The end-of-document token of base models. It comes before what `tokenizer_config.json` names, which for chat models is
# their end of turn: a base model and the chat model made of it then end documents alike.
_END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",  # DeepSeek's spelling, with full-width bars
)
_LAST_RESORTS = ("<|im_end|>", "[SEP]")
_CONFIG = "tokenizer_config.json"


class Tokenizer(Protocol):
    """Interface of the tokenizers for preparation and inspection."""

    @property
    def name(self) -> str:
        """`bytes`, the name of the folder of `tokenizer.json`, or `OWNER/NAME` of the Hub."""

    @property
    def commit(self) -> str | None:
        """Commit of the Hub's repository; None if it is not from the Hub."""

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
    commit = None
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

    commit: str | None = None

    def __init__(self, path: Path, eos: str | None = None, config: Callable[[], Path | None] | None = None) -> None:
        """Read `path` (a `tokenizer.json` or its folder); `eos` names the end token, which is detected if None.

        config: returns the path of its `tokenizer_config.json`, which may name the end token, or None if there is none;
        by default the file of this name beside a `tokenizer.json`.

        Raises UserError if the file cannot be read or no end token is found.
        """
        import tokenizers  # imported here, so that the bytes tokenizer does not need it

        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL character
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"tokenizer {str(path)!r}: {reason}; use 'bytes', the path of a Hugging Face tokenizer.json, or "
                f"OWNER/NAME of a repository of its Hub"
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
        self.eos = eos or self._find_eos(config or self._config_beside)
        eos_id = self._tokenizer.token_to_id(self.eos)
        if eos_id is None:
            raise UserError(f"{path}: has no token {self.eos!r}; name its end-of-document token with --eos")
        self.eos_id = int(eos_id)

    def _config_beside(self) -> Path | None:
        path = self.file.with_name(_CONFIG)
        return path if self.file.name == "tokenizer.json" and path.is_file() else None

    def _find_eos(self, config: Callable[[], Path | None]) -> str:
        # Only special tokens: a vocabulary trained on HTML may have an ordinary token "</s>".
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        known = [token for token in (*_END_TOKENS, *_LAST_RESORTS) if token in special]
        if known and known[0] in _END_TOKENS:
            return known[0]
        if (path := config()) and (named := _read_eos(path)):
            return named
        if known:
            return known[0]
        raise UserError(
            f"{self.file}: no end-of-document token found (none of {', '.join((*_END_TOKENS, *_LAST_RESORTS))} is a "
            f"special token, and no {_CONFIG} beside it names one); name the one to use with --eos"
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the ids of each text, 1-D, without special tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays: list[Tokens] = [np.array(encoding.ids, token_dtype(self.vocab_size)) for encoding in encodings]
        return arrays

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Return the text of ids [n], including special tokens."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False))


def _read_eos(path: Path) -> str | None:
    """Return the `eos_token` that a `tokenizer_config.json` names. Raises UserError if the file is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; name the end-of-document token with --eos") from None
    token = content.get("eos_token") if isinstance(content, dict) else None
    if isinstance(token, dict):  # with its properties, as tokenizers of transformers 4 write it
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def open_tokenizer(spec: str, eos: str | None = None) -> ByteTokenizer | HuggingFaceTokenizer:
    """Open a tokenizer: `bytes`; a path of this machine, of a `tokenizer.json` or its folder; else, if it reads
    `OWNER/NAME[@REVISION]`, that of a repository of the Hugging Face Hub, which `hf://` before it always means.

    eos: its end token. Raises UserError if there is no such tokenizer, or none of its tokens is known to end documents.
    """
    if spec != "bytes":
        if web := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", spec):
            raise UserError(f"tokenizer {spec}: is a web page; write {web[1]}")
        repository = None if _exists(spec) else parse_model(spec)
        return HuggingFaceTokenizer(Path(spec), eos) if repository is None else _of_hub(spec, repository, eos)
    if eos is not None:
        raise UserError(f"--eos {eos!r}: the bytes tokenizer has its own end token, 256; remove --eos")
    return ByteTokenizer()


def _exists(spec: str) -> bool:
    try:
        return not spec.startswith("hf://") and os.path.lexists(spec)
    except ValueError:  # a NUL character
        return True


def _of_hub(spec: str, repository: Repository, eos: str | None) -> HuggingFaceTokenizer:
    """Open a repository's tokenizer, at the commit that the Hub names; if it gives no answer, at that in the cache."""
    before = f"tokenizer {spec!r}:"
    unreachable: UnreachableError | None = None

    def fetch(file: str, revision: str | None) -> Path | None:
        try:
            return repository.fetch(file, revision, cached=unreachable is not None)
        except UserError as error:
            raise UserError(f"{before} {error}") from error

    missing = "" if spec.startswith("hf://") else "there is no such file here, and "
    try:
        repository.commit()
    except UnreachableError as error:
        unreachable = error
    except UserError as error:
        raise UserError(f"{before} {missing}{error}") from error
    # By the revision, not by its commit: the cache then knows which commit the revision named.
    path = fetch("tokenizer.json", repository.revision)
    if path is None and unreachable is not None:
        raise UserError(
            f"{before} {missing}{unreachable}, and the cache {cache()} does not have this tokenizer; prepare once with "
            f"a network, or give the path of a tokenizer.json"
        ) from unreachable
    if path is None:
        raise UserError(
            f"{before} the repository has no tokenizer.json; make one with transformers: "
            f"AutoTokenizer.from_pretrained({repository.name!r}).save_pretrained('FOLDER'), and use that folder"
        )
    commit = path.parent.name  # the cache has a folder per commit, snapshots/COMMIT

    def config() -> Path | None:
        found = fetch(_CONFIG, commit)
        if found is None and unreachable is not None:
            raise UserError(
                f"{before} {unreachable}, and the cache {cache()} does not have its {_CONFIG}, which may name the "
                f"end-of-document token; name it with --eos"
            ) from unreachable
        return found

    tokenizer = HuggingFaceTokenizer(path, eos, config)
    tokenizer.name, tokenizer.commit = repository.name, commit
    return tokenizer

"""`manifest.json`: the contents of a prepared corpus, and the check that it is complete."""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, ValidationError

from longctx.config import Config
from longctx.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from longctx.errors import UserError

SplitName = Literal["train", "heldout"]

FORMAT: Final = "longctx-data"
VERSION: Final = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
ERRORS_FILE = "errors.jsonl"


def _inside(file: str) -> str:
    """Return the path of a file, relative to the corpus; raise ValueError if it leads out of it."""
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{file!r} is not inside the corpus")
    return file


FileInside = Annotated[str, AfterValidator(_inside)]


class TokenizerEntry(Config):
    """The tokenizer of a corpus."""

    name: str
    fingerprint: str
    """SHA-256 of the definition of the ids: for a Hugging Face tokenizer, of its `tokenizer.json`."""
    vocab_size: int
    eos_id: int
    eos: str | None
    """Spelling of the end token; None for bytes."""
    file: FileInside | None
    """Name of the copy of `tokenizer.json` beside the manifest; None for bytes."""
    commit: str | None = None
    """Commit of the Hub's repository `name` that it is from; None: it is not from the Hub."""


class ShardEntry(Config):
    """A Parquet shard."""

    file: FileInside
    """Path relative to the manifest's directory."""
    rows: int
    tokens: int
    bytes: int
    sha256: str
    footer: str | None = None
    """Digest of its footer (`longctx.data.footer`), which is compared at every start; None: an earlier version of
    longctx prepared it."""


class SplitEntry(Config):
    """A split and its shards, in order."""

    documents: int
    tokens: int
    lengths: tuple[int, ...]
    """Histogram of document lengths: entry k counts those of 2^k to 2^(k+1) - 1 tokens, including the end token."""
    shards: tuple[ShardEntry, ...]


class InputEntry(Config):
    """Totals for one input, over both splits."""

    path: str
    """Absolute path, or URL."""
    name: str
    commit: str | None = None
    """Commit of the data set of the Hub that was read; None: it is not from the Hub."""
    files: int
    documents: int
    tokens: int


class Options(Config):
    """The options of `longctx data prepare` that determine the contents of the corpus."""

    join: Literal["none", "folder"]
    on_error: Literal["stop", "skip"]
    column: str
    suffixes: tuple[str, ...]
    exclude: tuple[str, ...]
    heldout: float


def _again(directory: Path) -> str:
    return f"prepare it (again) with `longctx data prepare INPUT… --out {directory}`"


class Manifest(Config):
    """The manifest of a corpus written by `longctx data prepare`."""

    format: Literal["longctx-data"] = FORMAT
    version: Literal[1] = VERSION
    tokenizer: TokenizerEntry
    options: Options
    splits: dict[SplitName, SplitEntry]
    inputs: tuple[InputEntry, ...]
    passed_over: dict[str, int] = Field(default_factory=dict)
    """Number of files and folders that were not read, by reason."""
    errors: dict[str, int] = Field(default_factory=dict)
    """Number of skipped inputs by kind of error; `errors.jsonl` lists each."""

    def save(self, directory: Path) -> None:
        """Write `manifest.json` and sync it to disk."""
        with open(directory / MANIFEST_FILE, "w", encoding="utf-8") as stream:
            stream.write(self.model_dump_json(indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def load(cls, directory: Path | str) -> "Manifest":
        """Read `directory`'s manifest and check that every shard exists with its recorded size, without reading it.

        Raises UserError naming the file that is missing or truncated, and what to do.
        """
        directory = Path(directory)
        manifest = cls.read(directory)
        again = _again(directory)
        for shard in (shard for split in manifest.splits.values() for shard in split.shards):
            file = directory / shard.file
            try:
                size = file.stat().st_size
            except OSError as error:
                raise UserError(f"shard {file}: {error.strerror}; copy it back, or {again}") from None
            if size != shard.bytes:
                raise UserError(
                    f"shard {file}: has {size} bytes, but the manifest lists {shard.bytes}; copy it again, or {again}"
                )
        return manifest

    @classmethod
    def read(cls, directory: Path | str) -> "Manifest":
        """Read `directory`'s manifest without checking the shards: enough to open the tokenizer.

        Raises UserError if there is no manifest or it is damaged.
        """
        directory = Path(directory)
        again = _again(directory)
        if not directory.is_dir():
            raise UserError(f"data directory {directory} does not exist; {again}")
        path = directory / MANIFEST_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{directory} is not a prepared corpus: it has no {MANIFEST_FILE}; {again}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: damaged, not JSON: {error}; {again}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not the manifest of a prepared corpus (no format {FORMAT!r}); {again}")
        if content.get("version") != VERSION:
            raise UserError(
                f"{path}: format version {content.get('version')!r}, but this longctx reads version {VERSION}; {again}"
            )
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; {again}") from None

    def open_tokenizer(self, directory: Path | str) -> ByteTokenizer | HuggingFaceTokenizer:
        """Open the tokenizer of the corpus in `directory`.

        Raises UserError if its file is missing or was replaced by another one.
        """
        entry = self.tokenizer
        if entry.file is None:
            return ByteTokenizer()
        path = Path(directory) / entry.file
        tokenizer = HuggingFaceTokenizer(path, entry.eos)
        if tokenizer.fingerprint != entry.fingerprint:
            raise UserError(f"{path}: is not the tokenizer of this corpus; restore the file or prepare again")
        return tokenizer

    def fingerprint(self, split: SplitName) -> str:
        """Return the SHA-256 of the split's tokenizer and shards; it changes with the tokens and their order."""
        digest = hashlib.sha256(f"{self.tokenizer.fingerprint} {self.tokenizer.eos_id}".encode())
        for shard in self.splits[split].shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()

    def verify(self, directory: Path | str) -> None:
        """Read every shard and compare its SHA-256; raise UserError naming the first that differs."""
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            file = Path(directory) / shard.file
            with open(file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != shard.sha256:
                raise UserError(
                    f"shard {file}: its content is damaged (SHA-256 {digest}, manifest {shard.sha256}); "
                    f"copy it again, or prepare the corpus again"
                )

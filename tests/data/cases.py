"""Corpora and inputs for the tests of data."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from longctx.data.corpus import Corpus
from longctx.data.manifest import Manifest, Options, SplitEntry, TokenizerEntry
from longctx.data.prepare import prepare
from longctx.data.shards import SplitWriter
from longctx.data.tokenizer import ByteTokenizer

END = ByteTokenizer.eos_id


def write_tree(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write `files` (path below `root`: content); returns `root`."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def write_lines(path: Path, rows: list[object]) -> Path:
    """Write JSON lines; a `bytes` row goes in as it is."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def write_parquet(path: Path, texts: list[str | None], column: str = "text", **options: object) -> Path:
    """Write a Parquet file with one string column."""
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, **options)
    return path


def texts(directory: Path, split: str = "train") -> dict[str, str]:
    """Every document of a split by source, decoded; each must end with the one end token."""
    corpus = Corpus(directory, split)
    tokenizer = corpus.manifest.open_tokenizer(directory)
    found = {}
    for document in range(corpus.documents):
        tokens = corpus.read(document)
        assert np.flatnonzero(tokens == tokenizer.eos_id).tolist() == [len(tokens) - 1]
        found[corpus.source(document)] = tokenizer.decode(tokens[:-1])
    return found


def prepared(inputs: list[Path], out: Path, **options: object) -> Manifest:
    """Prepare without a bar, all documents to `train` unless told otherwise."""
    return prepare([str(path) for path in inputs], out, **{"heldout": 0.0, "progress": False, **options})


def corpus_of(
    directory: Path, lengths: list[int], *, row_group_tokens: int = 16, shard_tokens: int = 64, split: str = "train"
) -> Path:
    """A corpus of documents of these lengths: document d is d·1000, d·1000 + 1, … (mod 2^16) and an end token."""
    directory.mkdir(parents=True)
    writer = SplitWriter(directory, split, np.uint16, shard_tokens=shard_tokens, row_group_tokens=row_group_tokens)
    for number, length in enumerate(lengths):
        writer.add(document_of(number, length), f"document {number}")
    tokenizer = ByteTokenizer()
    empty = SplitEntry(documents=0, tokens=0, lengths=(), shards=())
    Manifest(
        tokenizer=TokenizerEntry(
            name="bytes", fingerprint=tokenizer.fingerprint, vocab_size=257, eos_id=END, eos=None, file=None
        ),
        options=Options(join="none", on_error="stop", column="text", suffixes=(), exclude=(), heldout=0.0),
        splits={"train": empty, "heldout": empty, split: writer.finish()},
        inputs=(),
    ).save(directory)
    return directory


def document_of(number: int, length: int) -> np.ndarray:
    """The document that `corpus_of` writes."""
    tokens = (number * 1000 + 1000 + np.arange(length)).astype(np.uint16)
    tokens[-1] = END
    return tokens


def write_tokenizer(path: Path, *, end: str | None = "<|endoftext|>", truncation: int | None = None) -> Path:
    """A small byte-level BPE as `tokenizer.json`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[] if end is None else [end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    if truncation is not None:
        tokenizer.enable_truncation(truncation)
        tokenizer.enable_padding(length=truncation)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path

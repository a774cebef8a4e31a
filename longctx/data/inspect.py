"""`longctx data inspect`: a report on a prepared corpus."""

import heapq
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from longctx.data.corpus import Corpus, Index
from longctx.data.manifest import ERRORS_FILE, Manifest, SplitEntry
from longctx.errors import UserError
from longctx.printable import printable

_CONTEXTS = (2**12, 2**15, 2**17, 2**20)
"""Lengths, in tokens, beyond which documents and tokens are counted."""
_BAR = 40
_LONGEST = 5
_ERRORS = 5
_SAMPLE_TOKENS = 400


def inspect(directory: Path | str, *, verify: bool = False) -> Group:
    """Return the report as a rich Group: tokenizer, splits, document lengths, long documents, skipped input, sample.

    verify: read every shard and compare its SHA-256 with the manifest's.

    Raises UserError if the directory is not a complete corpus.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    if verify:
        manifest.verify(directory)
    parts: list[RenderableType] = [*_head(directory, manifest, verify)]
    for name, split in manifest.splits.items():
        if split.documents:
            parts += ["", _text(f"{name}: documents by length in tokens", style="bold"), _histogram(split)]
    corpus = Corpus(directory)
    parts += ["", _text("long documents of train", style="bold"), _long_documents(corpus.lengths)]
    parts += ["", _text("longest documents of train", style="bold"), _longest(corpus)]
    if manifest.errors:
        parts += ["", _text("input skipped during preparation", style="bold"), *_errors(directory, manifest)]
    parts += ["", _text(f"sample: {corpus.source(0)}", style="bold"), _text(_sample(corpus), lines=True)]
    return Group(*parts)


def _text(text: str, style: str = "", *, lines: bool = False) -> Text:
    return Text(printable(text, lines=lines), style)


def _at(commit: str | None) -> str:
    return "" if commit is None else f" at commit {commit}"


def _head(directory: Path, manifest: Manifest, verified: bool) -> Iterator[RenderableType]:
    entry = manifest.tokenizer
    end = f"{entry.eos_id}" if entry.eos is None else f"{entry.eos_id} ({entry.eos})"
    checked = ", every shard's content verified" if verified else ""
    yield _text(f"{directory}: format version {manifest.version}{checked}", style="bold")
    tokenizer = f"tokenizer {entry.name}{_at(entry.commit)}"
    yield _text(f"{tokenizer}: vocabulary {entry.vocab_size:,}, end of document {end}, {entry.fingerprint[:16]}…")
    for source in manifest.inputs:
        counts = f"{source.files:,} files, {source.documents:,} documents, {source.tokens:,} tokens"
        yield _text(f"from {source.path}{_at(source.commit)}: {counts}")
    for reason, count in manifest.passed_over.items():
        yield _text(f"ignored: {count:,} {reason}")
    table = Table("split", box=None)
    for column in ("documents", "tokens", "mean length", "shards", "MB"):
        table.add_column(column, justify="right")
    for name, split in manifest.splits.items():
        mean = split.tokens // max(1, split.documents)
        megabytes = sum(shard.bytes for shard in split.shards) / 1e6
        row = (f"{split.documents:,}", f"{split.tokens:,}", f"{mean:,}", f"{len(split.shards)}", f"{megabytes:,.1f}")
        table.add_row(name, *row)
    yield table


def _histogram(split: SplitEntry) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    first = next(k for k, count in enumerate(split.lengths) if count)
    most = max(split.lengths)
    for k, count in islice(enumerate(split.lengths), first, None):
        # At least one mark: a few very long documents may be the point of the corpus.
        marks = -(-count * _BAR // most)
        table.add_row(f"{2**k:,} – {2 ** (k + 1) - 1:,}", _text("█" * marks), f"{count:,}")
    return table


def _long_documents(lengths: Index) -> Table:
    """Tabulate, per length, the documents that are longer and the tokens that have more context than that."""
    table = Table("longer than", box=None)
    for column in ("documents", "of all tokens", "beyond this position"):
        table.add_column(column, justify="right")
    tokens = int(lengths.sum())
    for bound in _CONTEXTS:
        longer = lengths[lengths > bound]
        inside, beyond = int(longer.sum()), int((longer - bound).sum())
        table.add_row(f"{bound:,}", f"{len(longer):,}", f"{inside / tokens:.2%}", f"{beyond / tokens:.2%}")
    return table


def _longest(corpus: Corpus) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    for document in heapq.nlargest(_LONGEST, range(corpus.documents), key=corpus.lengths.__getitem__):
        table.add_row(f"{corpus.lengths[document]:,}", _text(corpus.source(document)))
    return table


def _errors(directory: Path, manifest: Manifest) -> Iterator[Text]:
    for kind, count in sorted(manifest.errors.items()):
        yield _text(f"{count:,} {kind}")
    path = directory / ERRORS_FILE
    try:
        with open(path, encoding="utf-8") as stream:
            entries = [json.loads(line) for line in islice(stream, _ERRORS)]
        lines = [f"  {entry['where']}: {entry['kind']}: {entry['detail']}" for entry in entries]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; copy it back, or prepare the corpus again") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged; copy it again, or prepare the corpus again") from None
    yield from map(_text, lines)
    if (more := sum(manifest.errors.values()) - len(entries)) > 0:
        yield _text(f"  and {more:,} more, in {path}")


def _sample(corpus: Corpus) -> str:
    tokenizer = corpus.manifest.open_tokenizer(corpus.directory)
    length = int(corpus.lengths[0])
    text = tokenizer.decode(corpus.read(0, 0, min(length, _SAMPLE_TOKENS)))
    return text if length <= _SAMPLE_TOKENS else text + " …"

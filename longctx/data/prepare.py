"""`longctx data prepare`: tokenises text files, folders, JSON lines and Parquet into a corpus.

Three stages, each at bounded memory: this process reads (`sources`), workers tokenise (`encode`), this process
assembles the pieces into documents and writes them (`shards`). The result depends only on the input and the options,
not on the number of workers.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal

import numpy as np

from longctx.data.discover import BadInput, Source, discover
from longctx.data.encode import PIECE_BYTES, EncodeJob, Fault, encode_in_order
from longctx.data.manifest import (
    ERRORS_FILE,
    TOKENIZER_FILE,
    InputEntry,
    Manifest,
    Options,
    ShardEntry,
    SplitEntry,
    SplitName,
    TokenizerEntry,
)
from longctx.data.progress import PreparationProgress
from longctx.data.shards import ROW_GROUP_TOKENS, SplitWriter, check_length
from longctx.data.sources import EndOfDocument, Event, Join, TextPiece, read_events
from longctx.data.staging import naming_disk_errors, resolve_target, staging
from longctx.data.tokenizer import Tokenizer, Tokens, open_tokenizer, token_dtype
from longctx.errors import UserError

OnError = Literal["stop", "skip"]

_BATCH_EVENTS = 4096


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    tokenizer: str = "bytes",
    eos: str | None = None,
    join: Join = "none",
    on_error: OnError = "stop",
    column: str = "text",
    suffixes: Sequence[str] = (),
    exclude: Sequence[str] = (),
    heldout: float = 0.02,
    shard_tokens: int = 2**27,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenise `inputs` into the new directory `out` and return its manifest.

    inputs: files and folders, `hf://datasets/OWNER/NAME[@REVISION][/PATH]` of the Hub, and URLs of object stores; see
    `longctx.data.discover` for what is read of each, and `longctx.data.sources` for how.
    tokenizer: `bytes`, the path of a `tokenizer.json` or its folder, or `OWNER/NAME[@REVISION]` of the Hub; `eos` names
    its end token if it is not detected.
    join: `folder` joins the files of each input folder, in order of their names, into one document.
    on_error: `stop` at the first bad file, line or row, or `skip` it and list it in `errors.jsonl`.
    column: key of the text in JSON lines, or column of the text in Parquet.
    suffixes, exclude: select files within folders, for instance `(".py",)` and `("site-packages",)`.
    heldout: fraction of documents held out for evaluation, chosen by a hash of their names, so that a document stays in
    its split when others are added. If no document is left for training, all go to `train`.
    shard_tokens: tokens after which a shard is closed.
    workers: tokenising processes; None: one per core, or only this process for bytes, which are cheaper to encode than
    to send to a worker.
    overwrite: replace an existing corpus at `out`.

    Raises UserError for invalid arguments, for bad input with `stop`, if there is nothing to write, if the disk is
    full, and if a worker dies; `out` is then unchanged.
    """
    _check(join, on_error, heldout, shard_tokens, workers)
    path = resolve_target(os.fspath(out), overwrite=overwrite)
    opened = open_tokenizer(tokenizer, eos)
    sources = discover([os.fspath(path) for path in inputs], suffixes, exclude)
    _check_apart(sources, path)
    if join == "folder" and not any(source.is_folder for source in sources):
        raise UserError(
            "--join folder: none of the inputs is a folder; name the folders to join into one document each"
        )
    if workers is None:
        workers = 1 if opened.file is None else _cores()
    options = Options(
        join=join,
        on_error=on_error,
        column=column,
        suffixes=tuple(suffixes),
        exclude=tuple(exclude),
        heldout=heldout,
    )
    with staging(path) as partial, ExitStack() as stack:
        entry = _copy_tokenizer(opened, partial)
        spec = "bytes" if entry.file is None else str(partial / entry.file)
        total = sum(file.size for source in sources for file in source.files)
        bar = stack.enter_context(PreparationProgress(total, shown=progress))
        assembly = _Assembly(partial, opened, options, shard_tokens, bar.announce)
        stack.callback(assembly.close)
        batches = _batches(sources, join, column, bar.announce)
        for events, tokens, results in encode_in_order(batches, _jobs, tokenizer=spec, eos=entry.eos, workers=workers):
            size = sum(event.size for _, event in events if not isinstance(event, EndOfDocument))
            bar.update(size, assembly.documents, assembly.encoded + len(tokens))
            assembly.add(events, tokens, results)
        bar.update(0, assembly.documents, assembly.encoded)
        manifest = Manifest(
            tokenizer=entry,
            options=options,
            splits=assembly.finish(),
            inputs=tuple(
                InputEntry(
                    path=source.path,
                    name=source.name,
                    commit=source.commit,
                    files=len(source.files),
                    documents=assembly.input_documents[index],
                    tokens=assembly.input_tokens[index],
                )
                for index, source in enumerate(sources)
            ),
            passed_over=dict(sum((source.passed_over for source in sources), Counter())),
            errors=dict(assembly.errors),
        )
        with naming_disk_errors(partial):
            manifest.save(partial)
    return manifest


def _check(join: str, on_error: str, heldout: float, shard_tokens: int, workers: int | None) -> None:
    if join not in ("none", "folder"):
        raise UserError(f"--join {join!r}: write 'none' or 'folder'")
    if on_error not in ("stop", "skip"):
        raise UserError(f"--on-error {on_error!r}: write 'stop' or 'skip'")
    if not 0 <= heldout < 1:
        raise UserError(f"--heldout {heldout}: must be a fraction of the documents, at least 0 and below 1")
    if shard_tokens <= 0:
        raise UserError(f"--shard-tokens {shard_tokens}: must be above 0")
    if workers is not None and workers <= 0:
        raise UserError(f"--workers {workers}: must be above 0")


def _check_apart(sources: list[Source], out: Path) -> None:
    for source in (source for source in sources if source.is_local):
        real = Path(source.path).resolve()
        if out == real or out in real.parents:
            raise UserError(f"input {source.path} is inside --out {out}, which would be replaced; choose another --out")
        if source.is_folder and real in out.parents:
            raise UserError(f"--out {out} is inside the input {source.path}; choose a directory outside it")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _copy_tokenizer(tokenizer: Tokenizer, partial: Path) -> TokenizerEntry:
    """Copy `tokenizer.json` beside the manifest, where the workers read it, and return its entry."""
    if tokenizer.file is not None:
        with naming_disk_errors(partial):
            (partial / TOKENIZER_FILE).write_bytes(tokenizer.file.read_bytes())
    return TokenizerEntry(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        eos=tokenizer.eos,
        file=None if tokenizer.file is None else TOKENIZER_FILE,
        commit=tokenizer.commit,
    )


Batch = list[tuple[int, Event]]
"""Events, each with the index of its input."""


def _batches(sources: list[Source], join: Join, column: str, announce: Callable[[str], None]) -> Iterator[Batch]:
    """Yield events in order, about `PIECE_BYTES` of text per batch, so that work outweighs the transfer to a worker."""
    batch: Batch = []
    size = 0
    for index, source in enumerate(sources):
        for event in read_events(source, join=join, column=column, announce=announce):
            batch.append((index, event))
            size += len(event.job.data) if isinstance(event, TextPiece) else 0
            if size >= PIECE_BYTES or len(batch) >= _BATCH_EVENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _jobs(batch: Batch) -> list[EncodeJob]:
    return [event.job for _, event in batch if isinstance(event, TextPiece)]


class _Assembly:
    """Assembles pieces into items, items into documents, and documents into splits."""

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        options: Options,
        shard_tokens: int,
        announce: Callable[[str], None],
    ) -> None:
        """announce: called with "writing NAME" before a document that takes time, and with "" after it."""
        self._directory = directory
        self._announce = announce
        self._options = options
        dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eos_id], dtype=dtype)
        self._writers: dict[SplitName, SplitWriter] = {
            split: SplitWriter(directory, split, dtype, shard_tokens=shard_tokens) for split in ("train", "heldout")
        }
        self._document: list[Tokens] = []
        self._document_tokens = 0
        self._item: list[Tokens] = []
        self._item_tokens = 0
        self._item_failed = False
        self._errors_stream: IO[str] | None = None
        self.encoded = 0
        """Tokens so far, those of the document that has not ended included."""
        self.errors: Counter[str] = Counter()
        self.input_documents: Counter[int] = Counter()
        self.input_tokens: Counter[int] = Counter()

    @property
    def documents(self) -> int:
        return sum(writer.documents for writer in self._writers.values())

    def add(self, events: Batch, tokens: Tokens, results: list[int | Fault]) -> None:
        """Add a batch: its events, the tokens of its pieces, concatenated, and one result per piece."""
        position = 0
        self.encoded += len(tokens)
        result = iter(results)
        for index, event in events:
            if isinstance(event, EndOfDocument):
                self._end_document(index, event.source)
            elif isinstance(event, BadInput):
                self._report(event.where, event.kind, event.detail)
                self._end_item(failed=True)
            else:
                outcome = next(result)
                if isinstance(outcome, Fault):
                    if not self._item_failed:  # only the first fault of an item is reported
                        self._report(event.where, outcome.kind, outcome.detail)
                    self._item_failed = True
                else:
                    # A copy: a view would keep the whole batch in memory until the document is written.
                    self._item.append(tokens[position : position + outcome].copy())
                    position += outcome
                    self._item_tokens += outcome
                    # Before the end of the document: a small compressed file may unpack to more than the memory.
                    check_length(event.where, self._document_tokens + self._item_tokens)
                if event.last:
                    self._end_item(failed=self._item_failed)

    def _end_item(self, *, failed: bool) -> None:
        if not failed:
            self._document += self._item
            self._document_tokens += self._item_tokens
        self._item, self._item_tokens, self._item_failed = [], 0, False

    def _end_document(self, index: int, source: str) -> None:
        if not self._document:
            return
        tokens = np.concatenate([*self._document, self._end])
        self._document, self._document_tokens = [], 0
        self.encoded += 1  # the end token
        writer = self._writers[self._split_of(source)]
        if len(tokens) > ROW_GROUP_TOKENS:
            self._announce(f"writing {source}")
            writer.add(tokens, source)
            self._announce("")
        else:
            writer.add(tokens, source)
        self.input_documents[index] += 1
        self.input_tokens[index] += len(tokens)

    def _split_of(self, source: str) -> SplitName:
        digest = hashlib.sha256(source.encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") < self._options.heldout * 2**64 else "train"

    def _report(self, where: str, kind: str, detail: str) -> None:
        if self._options.on_error == "stop":
            raise UserError(
                f"{where}: {kind}: {detail}; fix it, leave it out (--suffix, --exclude), "
                f"or skip bad input with --on-error skip"
            )
        self.errors[kind] += 1
        with naming_disk_errors(self._directory / ERRORS_FILE):
            if self._errors_stream is None:
                self._errors_stream = open(self._directory / ERRORS_FILE, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
            self._errors_stream.write(json.dumps({"where": where, "kind": kind, "detail": detail}) + "\n")

    def close(self) -> None:
        """Close `errors.jsonl` if it is open; may be called twice."""
        if self._errors_stream is not None:
            with naming_disk_errors(self._directory / ERRORS_FILE):
                self._errors_stream.close()

    def finish(self) -> dict[SplitName, SplitEntry]:
        """Write pending documents and return the entries of both splits. Raises UserError if there is no document."""
        self.close()
        if not self.documents:
            reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(self.errors.items())) or "all are empty"
            raise UserError(f"the inputs contain no document: {reasons}; name other inputs")
        train, heldout = (self._writers[split].finish() for split in ("train", "heldout"))
        if train.documents == 0:
            train, heldout = self._move_to_train(heldout), train
        return {"train": train, "heldout": heldout}

    def _move_to_train(self, heldout: SplitEntry) -> SplitEntry:
        (self._directory / "heldout").rename(self._directory / "train")
        shards = tuple(_renamed(shard) for shard in heldout.shards)
        return heldout.model_copy(update={"shards": shards})


def _renamed(shard: ShardEntry) -> ShardEntry:
    return shard.model_copy(update={"file": shard.file.replace("heldout/", "train/", 1)})

"""`longctx data prepare`: text files, folders, JSON lines and Parquet into a corpus of tokens.

Three stages, each at bounded memory: this process reads (`sources`), workers tokenise (`encode`), this process puts
pieces together into documents and writes them (`shards`). The result depends on the input and the options alone, not
on the number of workers.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal

import numpy as np

from longctx.data.encode import PIECE_BYTES, Fault, Job, encode_in_order
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
from longctx.data.shards import SplitWriter
from longctx.data.sources import EndOfDocument, Event, Join, Piece, Problem, Source, discover, read
from longctx.data.staging import naming_disk_errors, staging, target
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
    """Tokenise `inputs` into the new directory `out`; returns its manifest.

    inputs: files and folders, see `longctx.data.sources` for how each is read.
    tokenizer: `bytes` or the path of a `tokenizer.json`; `eos` names its end token where that cannot be found.
    join: `folder` makes one document of each input that is a folder, its files in order of their names.
    on_error: `stop` at the first bad file, line or row, or `skip` it and name it in `errors.jsonl`.
    column: the text's key in JSON lines, or column in Parquet.
    suffixes, exclude: which files of a folder are taken, for instance `(".py",)` and `("site-packages",)`.
    heldout: the share of documents kept for evaluation, chosen by a hash of their names, so that a document stays on
    its side when others are added. Where that leaves nothing to train on, all documents go to `train`.
    shard_tokens: a shard ends once it holds as many.
    workers: tokenising processes; None: a core each, but none beside this one for bytes, which cost less to count
    than to hand over.
    overwrite: replace a corpus that is already at `out`.

    Raises UserError for every mistake above, for bad input with `stop`, where nothing is left to write, where the
    disk is full, and where a worker dies; `out` is then as it was before.
    """
    _check(join, on_error, heldout, shard_tokens, workers)
    path = target(os.fspath(out), overwrite=overwrite)
    opened = open_tokenizer(tokenizer, eos)
    sources = discover([os.fspath(one) for one in inputs], suffixes, exclude)
    _check_apart(sources, path)
    if join == "folder" and not any(source.is_folder for source in sources):
        raise UserError("--join folder: none of the inputs is a folder; name the folders that become one document each")
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
        entry = _keep_tokenizer(opened, partial)
        spec = "bytes" if entry.file is None else str(partial / entry.file)
        assembly = _Assembly(partial, opened, options, shard_tokens)
        stack.callback(assembly.close)
        total = sum(file.size for source in sources for file in source.files)
        bar = stack.enter_context(PreparationProgress(total, shown=progress))
        batches = _batches(sources, join, column)
        for events, tokens, results in encode_in_order(batches, _jobs, tokenizer=spec, eos=entry.eos, workers=workers):
            assembly.take(events, tokens, results)
            size = sum(event.size for _, event in events if not isinstance(event, EndOfDocument))
            bar.update(size, assembly.documents, assembly.tokens)
        manifest = Manifest(
            tokenizer=entry,
            options=options,
            splits=assembly.finish(),
            inputs=tuple(
                InputEntry(
                    path=source.path,
                    name=source.name,
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
        raise UserError(f"--heldout {heldout}: a share of the documents, at least 0 and below 1")
    if shard_tokens <= 0:
        raise UserError(f"--shard-tokens {shard_tokens}: must be above 0")
    if workers is not None and workers <= 0:
        raise UserError(f"--workers {workers}: must be above 0")


def _check_apart(sources: list[Source], out: Path) -> None:
    for source in sources:
        real = Path(source.path).resolve()
        if out == real or out in real.parents:
            raise UserError(
                f"input {source.path} lies inside --out {out}, which would be replaced; choose another --out"
            )
        if source.is_folder and real in out.parents:
            raise UserError(f"--out {out} lies inside the input {source.path}; choose a directory outside it")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_tokenizer(tokenizer: Tokenizer, partial: Path) -> TokenizerEntry:
    """Copy its file beside the manifest, from where the workers read it too."""
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
    )


Batch = list[tuple[int, Event]]
"""Events with the number of their input."""


def _batches(sources: list[Source], join: Join, column: str) -> Iterator[Batch]:
    """Events in order, about `PIECE_BYTES` of text at a time: enough work to be worth the way to a worker."""
    batch: Batch = []
    size = 0
    for index, source in enumerate(sources):
        for event in read(source, join=join, column=column):
            batch.append((index, event))
            size += len(event.job.data) if isinstance(event, Piece) else 0
            if size >= PIECE_BYTES or len(batch) >= _BATCH_EVENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _jobs(batch: Batch) -> list[Job]:
    return [event.job for _, event in batch if isinstance(event, Piece)]


class _Assembly:
    """Puts pieces together into items, items into documents, and documents into splits."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, options: Options, shard_tokens: int) -> None:
        self._directory = directory
        self._options = options
        dtype = token_dtype(tokenizer.vocab_size)
        self._end = np.array([tokenizer.eos_id], dtype=dtype)
        self._writers: dict[SplitName, SplitWriter] = {
            split: SplitWriter(directory, split, dtype, shard_tokens=shard_tokens) for split in ("train", "heldout")
        }
        self._document: list[Tokens] = []
        self._item: list[Tokens] = []
        self._spoiled = False
        self._errors_stream: IO[str] | None = None
        self.errors: Counter[str] = Counter()
        self.input_documents: Counter[int] = Counter()
        self.input_tokens: Counter[int] = Counter()

    @property
    def documents(self) -> int:
        return sum(writer.documents for writer in self._writers.values())

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def take(self, events: Batch, tokens: Tokens, results: list[int | Fault]) -> None:
        """The batch's events, its tokens end to end, and a result for each of its pieces."""
        position = 0
        result = iter(results)
        for index, event in events:
            if isinstance(event, EndOfDocument):
                self._end_document(index, event.source)
            elif isinstance(event, Problem):
                self._report(event.where, event.kind, event.detail)
                self._item, self._spoiled = [], False
            else:
                found = next(result)
                if isinstance(found, Fault):
                    if not self._spoiled:  # the first fault of an item names it
                        self._report(event.where, found.kind, found.detail)
                    self._spoiled = True
                else:
                    # A copy: a view would keep the whole batch alive for as long as its document.
                    self._item.append(tokens[position : position + found].copy())
                    position += found
                if event.last:
                    self._document += [] if self._spoiled else self._item
                    self._item, self._spoiled = [], False

    def _end_document(self, index: int, source: str) -> None:
        if not self._document:
            return
        tokens = np.concatenate([*self._document, self._end])
        self._document = []
        self._writers[self._split_of(source)].add(tokens, source)
        self.input_documents[index] += 1
        self.input_tokens[index] += len(tokens)

    def _split_of(self, source: str) -> SplitName:
        digest = hashlib.sha256(source.encode()).digest()
        return "heldout" if int.from_bytes(digest[:8], "big") < self._options.heldout * 2**64 else "train"

    def _report(self, where: str, kind: str, detail: str) -> None:
        if self._options.on_error == "stop":
            raise UserError(
                f"{where}: {kind}: {detail}; mend it, leave it out (--suffix, --exclude), "
                f"or skip what is bad with --on-error skip"
            )
        self.errors[kind] += 1
        with naming_disk_errors(self._directory / ERRORS_FILE):
            if self._errors_stream is None:
                self._errors_stream = open(self._directory / ERRORS_FILE, "w", encoding="utf-8")  # noqa: SIM115 - closed by `close`
            self._errors_stream.write(json.dumps({"where": where, "kind": kind, "detail": detail}) + "\n")

    def close(self) -> None:
        """Close `errors.jsonl`; nothing to do where there is none, or a second time."""
        if self._errors_stream is not None:
            with naming_disk_errors(self._directory / ERRORS_FILE):
                self._errors_stream.close()

    def finish(self) -> dict[SplitName, SplitEntry]:
        """Write what is pending; both splits' entries. Raises UserError where there is no document at all."""
        self.close()
        if not self.documents:
            reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(self.errors.items())) or "all are empty"
            raise UserError(f"the inputs hold no document: {reasons}; name other inputs")
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

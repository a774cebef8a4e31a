"""Parallel tokenisation: the worker's encoder, and a process pool that yields results in order.

Workers import only numpy and the tokenizer: no torch, no pyarrow.
"""

import io
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from longctx.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokens, open_tokenizer, token_dtype
from longctx.errors import UserError

PIECE_BYTES = 2**20
"""Longest text that is tokenised in one call. Longer texts are split, after a line break where there is one, so that
memory stays bounded and one long document occupies every core. Only tokens across a split can differ from tokenising
the text in one call."""

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Text to tokenise, or a JSON line with a text column."""

    data: bytes
    offset: int = 0
    """Offset of `data` in its text, in bytes, for error messages."""
    column: str | None = None
    """Key of the text if `data` is a JSON line; None if it is text."""
    header: bytes = b""
    footer: bytes = b""
    """Added before and after the text of a JSON line."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a job produced no tokens."""

    kind: str
    detail: str


def split_text(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Split a stream into pieces of at most `PIECE_BYTES`; `read(n)` returns n bytes, fewer only at the end."""
    buffer = b""
    while True:
        buffer += read(PIECE_BYTES - len(buffer))
        if len(buffer) < PIECE_BYTES:
            break
        cut = buffer.rfind(b"\n") + 1 or _character_boundary(buffer)
        yield buffer[:cut]
        buffer = buffer[cut:]
    if buffer:
        yield buffer


def _character_boundary(data: bytes) -> int:
    """Return the offset of the last UTF-8 character that begins in the last 4 bytes; `len(data)` if none does."""
    for cut in range(len(data) - 1, len(data) - 5, -1):
        if data[cut] & 0xC0 != 0x80:
            # The character may be complete; splitting before it is correct in either case.
            return cut
    return len(data)


class Encoder:
    """Tokenises jobs with one tokenizer."""

    def __init__(self, tokenizer: ByteTokenizer | HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, jobs: list[EncodeJob]) -> tuple[Tokens, list[int | Fault]]:
        """Return the tokens of all jobs, concatenated, and per job its number of tokens or its fault."""
        empty = np.empty(0, token_dtype(self._tokenizer.vocab_size))
        encoded: list[Tokens] = []
        results: list[int | Fault] = []
        for job in jobs:
            texts = _texts(job)
            if isinstance(texts, Fault):
                results.append(texts)
                continue
            arrays = self._tokenizer.encode_batch(texts)
            encoded += arrays
            results.append(sum(map(len, arrays)))
        return np.concatenate([empty, *encoded]), results


def _texts(job: EncodeJob) -> list[str] | Fault:
    try:
        text = job.data.decode()
    except UnicodeDecodeError as error:
        return Fault("invalid UTF-8", f"byte {job.offset + error.start} is {job.data[error.start]:#04x}")
    if job.column is None:
        return [text]
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", str(error))
    if not isinstance(row, dict) or job.column not in row:
        content = (
            f"an object with {', '.join(map(repr, row)) or 'no keys'}" if isinstance(row, dict) else "not an object"
        )
        return Fault("missing column", f"no {job.column!r}: the line is {content[:200]}")
    value = row[job.column]
    if not isinstance(value, str):
        return Fault("not text", f"{job.column!r} is {type(value).__name__}, not a string")
    if not value:
        return Fault("empty", f"{job.column!r} is empty")
    try:
        data = job.header + value.encode() + job.footer
    except UnicodeEncodeError as error:
        return Fault("invalid UTF-8", f"character {error.start} of {job.column!r} is half of a surrogate pair")
    return [piece.decode() for piece in split_text(io.BytesIO(data).read)]


_encoder: Encoder | None = None  # one per worker process


def _start_worker(tokenizer: str, eos: str | None) -> None:
    global _encoder
    # Ctrl-C reaches the whole process group: the parent handles it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process per core: the tokenizer's own threads would compete with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(open_tokenizer(tokenizer, eos))
    # A worker waiting for a job does not notice that its parent was killed; this thread does.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(jobs: list[EncodeJob]) -> tuple[Tokens, list[int | Fault]]:
    assert _encoder is not None
    return _encoder(jobs)


def encode_in_order(
    batches: Iterable[Batch], jobs: Callable[[Batch], list[EncodeJob]], *, tokenizer: str, eos: str | None, workers: int
) -> Iterator[tuple[Batch, Tokens, list[int | Fault]]]:
    """Encode batches with `workers` processes (1: in this process) and yield (batch, tokens, results) in input order.

    At most two batches per worker are in flight, so memory does not grow with the input. Raises UserError if a worker
    dies.
    """
    if workers == 1:
        encoder = Encoder(open_tokenizer(tokenizer, eos))
        for batch in batches:
            yield batch, *encoder(jobs(batch))
        return
    # spawn: forking a process with threads (torch, pyarrow) may deadlock.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, eos)
    )
    in_flight: deque[tuple[Batch, Future[tuple[Tokens, list[int | Fault]]]]] = deque()
    try:
        for batch in batches:
            in_flight.append((batch, executor.submit(_work, jobs(batch))))
            if len(in_flight) >= 2 * workers:
                done, future = in_flight.popleft()
                yield done, *future.result()
        while in_flight:
            done, future = in_flight.popleft()
            yield done, *future.result()
    except BrokenProcessPool:
        raise UserError(
            f"one of the {workers} tokenising processes died, most likely out of memory; "
            f"use fewer of them (--workers {max(1, workers // 2)})"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)

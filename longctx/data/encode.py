"""Text to tokens on all cores: the work that a worker process does, and the pool that hands it out in order.

Workers import numpy and the tokenizer alone: no torch, no pyarrow.
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
"""A longer text is tokenised in pieces of at most this size, each cut after a line's end where it has one: memory
stays bounded, and one long document occupies every core. Only a token across that cut can differ from what the
tokenizer would make of the whole text."""

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of text, or a JSON line that holds one."""

    data: bytes
    offset: int = 0
    """Where `data` begins in its text, in bytes, for messages."""
    column: str | None = None
    """Where `data` is a JSON line: the key of its text."""
    header: bytes = b""
    footer: bytes = b""
    """Put around a JSON line's text."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a job gave no tokens."""

    kind: str
    detail: str


def pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Cut what `read(n)` gives (n bytes, fewer only at the end) into pieces of at most `PIECE_BYTES`."""
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
    """The last place, at most 3 bytes before the end, where a UTF-8 character begins; the end where there is none."""
    for cut in range(len(data) - 1, len(data) - 5, -1):
        if data[cut] & 0xC0 != 0x80:
            # The byte at `cut` begins a character, which may be complete: then nothing is lost by cutting before it.
            return cut
    return len(data)


class Encoder:
    """Runs jobs with one tokenizer."""

    def __init__(self, tokenizer: ByteTokenizer | HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, jobs: list[Job]) -> tuple[Tokens, list[int | Fault]]:
        """All jobs' tokens end to end, and for each job the number of its tokens or its fault."""
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


def _texts(job: Job) -> list[str] | Fault:
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
        found = f"an object with {', '.join(map(repr, row)) or 'no keys'}" if isinstance(row, dict) else "no object"
        return Fault("missing column", f"no {job.column!r}: the line is {found[:200]}")
    value = row[job.column]
    if not isinstance(value, str):
        return Fault("not text", f"{job.column!r} is {type(value).__name__}, not a string")
    if not value:
        return Fault("empty", f"{job.column!r} is empty")
    try:
        data = job.header + value.encode() + job.footer
    except UnicodeEncodeError as error:
        return Fault("invalid UTF-8", f"character {error.start} of {job.column!r} is half of a surrogate pair")
    return [piece.decode() for piece in pieces(io.BytesIO(data).read)]


_encoder: Encoder | None = None  # a worker process's own


def _start_worker(tokenizer: str, eos: str | None) -> None:
    global _encoder
    # Ctrl-C reaches the whole process group: the parent answers it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a core: the tokenizer's own threads would only compete with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(open_tokenizer(tokenizer, eos))
    # A worker that waits for a job does not notice that its parent was killed; this thread does.
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(jobs: list[Job]) -> tuple[Tokens, list[int | Fault]]:
    assert _encoder is not None
    return _encoder(jobs)


def encode_in_order(
    batches: Iterable[Batch], jobs: Callable[[Batch], list[Job]], *, tokenizer: str, eos: str | None, workers: int
) -> Iterator[tuple[Batch, Tokens, list[int | Fault]]]:
    """Encode batches with `workers` processes (1: in this one); yields (batch, tokens, results) in their order.

    At most two batches a worker are in flight, so memory does not grow with the input. Raises UserError where a
    worker dies.
    """
    if workers == 1:
        encoder = Encoder(open_tokenizer(tokenizer, eos))
        for batch in batches:
            yield batch, *encoder(jobs(batch))
        return
    # spawn: a fork of a process that has threads (torch, pyarrow) may deadlock.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, eos)
    )
    flight: deque[tuple[Batch, Future[tuple[Tokens, list[int | Fault]]]]] = deque()
    try:
        for batch in batches:
            flight.append((batch, executor.submit(_work, jobs(batch))))
            if len(flight) >= 2 * workers:
                done, future = flight.popleft()
                yield done, *future.result()
        while flight:
            done, future = flight.popleft()
            yield done, *future.result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} tokenising processes died, most often for lack of memory; "
            f"prepare again with fewer of them (--workers {max(1, workers // 2)})"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)

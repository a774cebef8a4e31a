"""Sequence packing: packed documents (`cu_seqlens`) of a corpus in sequences of exactly T tokens, without padding.

Documents of an epoch are concatenated in the epoch's order, epochs follow one another without a gap, and sequence i is
tokens [i·T, (i+1)·T) of that endless stream. No token of an epoch is skipped or read twice, whatever T; a document
that does not fit continues in the next sequence, and the end of an epoch shares its sequence with the next epoch.

Sequence i is a function of (corpus, range of lengths, seed, shuffling, T, i). `longctx.data.blend` blends the streams
of several corpora.

The order of an epoch is random but nearly sequential on disk: row groups are permuted, then documents are permuted
within windows of `shuffle_window` tokens of those row groups. The random numbers are PCG64's raw output, which numpy
keeps the same across versions and machines (unlike `Generator.permutation`).
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from longctx.data.corpus import Corpus, Index
from longctx.data.documents import Documents
from longctx.data.length_range import LengthRange
from longctx.errors import UserError
from longctx.kernels.loss import IGNORE

SHUFFLE_WINDOW = 2**24
ALL_LENGTHS = LengthRange()


class Shuffling(NamedTuple):
    """What the random order of a stream's documents depends on, beside the documents."""

    seed: int
    window: int
    """Tokens."""
    source: int = 0
    """Number in a blend."""


@dataclass(frozen=True)
class Sequence:
    """One packed sequence of exactly T tokens."""

    tokens: torch.Tensor
    """int64 [T]."""
    labels: torch.Tensor
    """int64 [T]: the next token of the same document, even if it is in the next sequence; -100 at its end token."""
    cu_seqlens: torch.Tensor
    """int64 [N+1]: 0 = c_0 < c_1 < … < c_N = T; a document continued from the previous sequence starts anew at 0."""
    index: int
    """Index in the stream."""


@dataclass(frozen=True)
class _Epoch:
    """One epoch: its document order, `documents` int64 [D], and their token offsets, `starts` int64 [D+1]."""

    documents: Index
    starts: Index


class SequenceStream:
    """The endless stream of packed sequences of a corpus, indexed from 0. Thread-safe."""

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        *,
        seed: int,
        shuffle: bool = True,
        shuffle_window: int = SHUFFLE_WINDOW,
        lengths: LengthRange = ALL_LENGTHS,
        source: int = 0,
    ) -> None:
        """Pack `corpus` into sequences of `sequence_length` tokens.

        seed: at least 0; without `shuffle`, documents keep their order, and seed and window have no effect.
        shuffle_window: tokens, of the row groups as stored, within which documents are shuffled.
        lengths: the documents that are read.
        source: number in a blend; with the same seed, each source has random numbers of its own.

        Raises UserError if these documents have fewer tokens than one sequence.
        """
        if sequence_length <= 0 or seed < 0 or shuffle_window <= 0:
            raise UserError(
                f"sequence_length {sequence_length} and shuffle_window {shuffle_window} must be above 0, "
                f"seed {seed} at least 0"
            )
        self.documents = Documents(corpus, lengths)
        self.sequence_length = sequence_length
        self._order = Shuffling(seed, shuffle_window, source) if shuffle else None
        self._tokens = self.documents.tokens
        if self._tokens < sequence_length:
            raise _too_few_tokens(self.documents, sequence_length)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sequences_per_epoch(self) -> float:
        """Sequences per epoch, usually a fraction: sequence i begins in epoch `int(i / sequences_per_epoch)`."""
        return self._tokens / self.sequence_length

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that determines the tokens of sequence i."""
        return stream_fingerprint(self.documents.fingerprint, self.sequence_length, self._order)

    def __getitem__(self, index: int) -> Sequence:
        """Return sequence `index`, any integer from 0.

        Raises UserError, naming the shard, if the corpus cannot be read.
        """
        if index < 0:
            raise IndexError(f"sequence {index}: a stream begins at 0 and has no end")
        length = self.sequence_length
        tokens = torch.empty(length, dtype=torch.int64)
        labels = torch.empty(length, dtype=torch.int64)
        ends: list[int] = [0]
        filled = 0
        while filled < length:
            number, position = divmod(index * length + filled, self._tokens)
            epoch = self._epoch(number)
            slot = int(np.searchsorted(epoch.starts, position, side="right")) - 1
            while filled < length and slot < len(epoch.documents):
                document = int(epoch.documents[slot])
                start = position - int(epoch.starts[slot])
                filled_to = min(length, filled + int(self.documents.lengths[document]) - start)
                self._copy(document, start, tokens[filled:filled_to], labels[filled:filled_to])
                position += filled_to - filled
                filled = filled_to
                ends.append(filled)
                slot += 1
        return Sequence(tokens, labels, torch.tensor(ends, dtype=torch.int64), index)

    def _copy(self, document: int, start: int, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Fill `tokens` [n] with a document's tokens from `start`, and `labels` [n] with those from `start + 1`."""
        count = len(tokens)
        stop = min(start + count + 1, int(self.documents.lengths[document]))
        values = self.documents.read(document, start, stop)
        tokens.numpy()[:] = values[:count]
        labels.numpy()[: stop - start - 1] = values[1:]
        labels.numpy()[stop - start - 1 :] = IGNORE

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                documents = self._permutation(number)
                starts = np.zeros(len(documents) + 1, dtype=np.int64)
                np.cumsum(self.documents.lengths[documents], out=starts[1:])
                self._epochs[number] = _Epoch(documents, starts)
                if len(self._epochs) > 2:  # a sequence may span two epochs
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def _permutation(self, epoch: int) -> Index:
        """Return the documents in an epoch's order, int64 [D]."""
        count, groups = len(self.documents), self.documents.row_groups
        if self._order is None:
            return np.arange(count, dtype=np.int64)
        seed, window, source = self._order
        random = np.random.PCG64(np.random.SeedSequence([seed, epoch], spawn_key=(source,) if source else ()))
        by_group = np.argsort(random.random_raw(len(groups) - 1), kind="stable")
        # Of tokens as stored: windows of row groups that are mostly out of range would not fit the corpus's cache.
        group_tokens = self.documents.stored_tokens
        before = np.cumsum(group_tokens[by_group]) - group_tokens[by_group]
        window_of_group = np.empty(len(by_group), dtype=np.int64)
        window_of_group[by_group] = before // window
        window_of_document = np.repeat(window_of_group, np.diff(groups))
        return np.lexsort((random.random_raw(count), window_of_document)).astype(np.int64, copy=False)


def stream_fingerprint(documents: str, sequence_length: int, order: Shuffling | None) -> str:
    """Return the fingerprint of a stream, SHA-256, hexadecimal, from that of its documents; `order`: None: stored."""
    stored = "stored"
    if order is not None:
        stored = f"seed {order.seed} window {order.window}" + (f" source {order.source}" if order.source else "")
    return hashlib.sha256(f"{documents} sequences of {sequence_length}, order {stored}".encode()).hexdigest()


def _too_few_tokens(documents: Documents, sequence_length: int) -> UserError:
    corpus, lengths = documents.corpus, documents.range
    place, less = f"{corpus.directory}: the split {corpus.split!r}", f"less than one sequence of {sequence_length}"
    if lengths.has_all:
        return UserError(
            f"{place} has {documents.tokens} tokens, {less}; prepare more text or use a shorter sequence_length"
        )
    return UserError(
        f"{place} has {documents.tokens} tokens in {len(documents)} documents of {lengths}, {less}; its "
        f"longest document has {corpus.lengths.max()} tokens. Change min_document or max_document, prepare more text, "
        "or use a shorter sequence_length"
    )

"""Sequence packing: packed documents (`cu_seqlens`) in sequences of exactly T tokens, without padding.

Documents of an epoch are concatenated in the epoch's order, epochs follow one another without a gap, and sequence i is
tokens [i·T, (i+1)·T) of that endless stream. No token of an epoch is skipped or read twice, whatever T; a document
that does not fit continues in the next sequence, and the end of an epoch shares its sequence with the next epoch.

Sequence i is a function of (corpus, seed, shuffling, T, i): the data cursor of a checkpoint is the integer i, on any
number of ranks. With another corpus, seed, shuffling or T, i means other tokens: compare `SequenceStream.fingerprint`
on resume.

The order of an epoch is random but nearly sequential on disk: row groups are permuted, then documents are permuted
within windows of `shuffle_window` tokens of those row groups. The random numbers are PCG64's raw output, which numpy
keeps the same across versions and machines (unlike `Generator.permutation`).
"""

import collections.abc
import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from longctx.data.config import DataConfig
from longctx.data.corpus import Corpus, Index
from longctx.data.manifest import Manifest
from longctx.errors import UserError
from longctx.kernels.loss import IGNORE

SHUFFLE_WINDOW = 2**24


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
    ) -> None:
        """Pack `corpus` into sequences of `sequence_length` tokens.

        seed: at least 0; without `shuffle`, documents keep their order, and seed and window have no effect.
        shuffle_window: tokens within which documents are shuffled.

        Raises UserError if the corpus has fewer tokens than one sequence.
        """
        if sequence_length <= 0 or seed < 0 or shuffle_window <= 0:
            raise UserError(
                f"sequence_length {sequence_length} and shuffle_window {shuffle_window} must be above 0, "
                f"seed {seed} at least 0"
            )
        self.corpus = corpus
        self.sequence_length = sequence_length
        self._order = (seed, shuffle_window) if shuffle else None
        self._tokens = corpus.tokens
        if self._tokens < sequence_length:
            raise UserError(
                f"{corpus.directory}: the split {corpus.split!r} has {self._tokens} tokens, less than one sequence "
                f"of {sequence_length}; prepare more text or use a shorter sequence_length"
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sequences_per_epoch(self) -> float:
        """Sequences per epoch, usually a fraction: sequence i begins in epoch `int(i / sequences_per_epoch)`."""
        return self._tokens / self.sequence_length

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that determines the tokens of sequence i."""
        return _stream_fingerprint(self.corpus.fingerprint, self.sequence_length, self._order)

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
                filled_to = min(length, filled + int(self.corpus.lengths[document]) - start)
                self._copy(document, start, tokens[filled:filled_to], labels[filled:filled_to])
                position += filled_to - filled
                filled = filled_to
                ends.append(filled)
                slot += 1
        return Sequence(tokens, labels, torch.tensor(ends, dtype=torch.int64), index)

    def _copy(self, document: int, start: int, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Fill `tokens` [n] with a document's tokens from `start`, and `labels` [n] with those from `start + 1`."""
        count = len(tokens)
        stop = min(start + count + 1, int(self.corpus.lengths[document]))
        values = self.corpus.read(document, start, stop)
        tokens.numpy()[:] = values[:count]
        labels.numpy()[: stop - start - 1] = values[1:]
        labels.numpy()[stop - start - 1 :] = IGNORE

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                documents = self._permutation(number)
                starts = np.zeros(len(documents) + 1, dtype=np.int64)
                np.cumsum(self.corpus.lengths[documents], out=starts[1:])
                self._epochs[number] = _Epoch(documents, starts)
                if len(self._epochs) > 2:  # a sequence may span two epochs
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def _permutation(self, epoch: int) -> Index:
        """Return the documents in an epoch's order, int64 [D]."""
        groups = self.corpus.row_groups
        if self._order is None:
            return np.arange(self.corpus.documents, dtype=np.int64)
        seed, window = self._order
        random = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
        by_group = np.argsort(random.random_raw(len(groups) - 1), kind="stable")
        group_tokens = np.add.reduceat(self.corpus.lengths, groups[:-1])
        before = np.cumsum(group_tokens[by_group]) - group_tokens[by_group]
        window_of_group = np.empty(len(by_group), dtype=np.int64)
        window_of_group[by_group] = before // window
        window_of_document = np.repeat(window_of_group, np.diff(groups))
        return np.lexsort((random.random_raw(self.corpus.documents), window_of_document)).astype(np.int64, copy=False)


class _First(collections.abc.Sequence[Sequence]):
    """The first `count` sequences of a stream, read on access."""

    def __init__(self, stream: SequenceStream, count: int) -> None:
        self._stream = stream
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        numbers = range(self._count)[index]
        return self._stream[numbers] if isinstance(numbers, int) else [self._stream[number] for number in numbers]


def _stream_fingerprint(corpus: str, sequence_length: int, order: tuple[int, int] | None) -> str:
    stored = "stored" if order is None else "seed {} window {}".format(*order)
    return hashlib.sha256(f"{corpus} sequences of {sequence_length}, order {stored}".encode()).hexdigest()


def train_fingerprint(manifest: Manifest, config: DataConfig, *, seed: int) -> str:
    """Return `train_stream(config, seed=seed).fingerprint` from the corpus's manifest, without opening a shard."""
    order = None if config.shuffle_window == "none" else (seed, config.shuffle_window)
    return _stream_fingerprint(manifest.fingerprint("train"), config.sequence_length, order)


def train_stream(config: DataConfig, *, seed: int) -> SequenceStream:
    """Open the training stream of a recipe's `[data]`.

    Raises UserError if the directory is not a complete corpus or has fewer tokens than one sequence.
    """
    if config.shuffle_window == "none":
        return SequenceStream(Corpus(config.path), config.sequence_length, seed=seed, shuffle=False)
    # Two windows: the current one and, at its end, the next.
    corpus = Corpus(config.path, cache_tokens=2 * config.shuffle_window)
    return SequenceStream(corpus, config.sequence_length, seed=seed, shuffle_window=config.shuffle_window)


def heldout_sequences(corpus: Corpus, sequence_length: int, count: int) -> collections.abc.Sequence[Sequence]:
    """Return `count` evaluation sequences of `corpus`, the same ones each time, read on access.

    Documents are in a fixed random order, because neighbours in the stored order are often similar. A corpus with fewer
    than `count` full sequences returns all of them (see `len`). Raises UserError if it has none.
    """
    stream = SequenceStream(corpus, sequence_length, seed=0)
    return _First(stream, min(count, corpus.tokens // sequence_length))

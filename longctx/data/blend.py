"""Blended streams: the packed sequences of several corpora, each with the share of its weight.

Each source packs its own documents into its own sequences, so that a sequence is of one source (as in Megatron-Core's
blended data sets). Sequence i of the blend is sequence n of source s, a function of i and the weights
(`longctx.data.blend_order`), and sequence n of a source a function of its corpus, the seed and n
(`longctx.data.loader`): the data cursor of a checkpoint is the integer i, on any number of ranks. With other corpora,
weights, ranges of lengths, order, seed or T, i means other tokens: compare `BlendedStream.fingerprint` on resume.

One corpus is a blend of one source, with the same sequences and fingerprint as its own stream.
"""

import collections.abc
import hashlib
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import overload

from longctx.data.blend_order import BlendOrder
from longctx.data.config import DataConfig, SourceConfig
from longctx.data.corpus import Corpus
from longctx.data.loader import SHUFFLE_WINDOW, Sequence, SequenceStream, Shuffling, stream_fingerprint
from longctx.data.manifest import Manifest, SplitName, TokenizerEntry
from longctx.errors import UserError

WORTHWHILE_EPOCHS = 4
"""Epochs up to which repeated tokens are worth almost as much as new ones (Muennighoff et al. 2023, section 6)."""


@dataclass(frozen=True)
class BlendSource:
    """One source of a blend."""

    config: SourceConfig
    stream: SequenceStream
    share: float
    """Fraction of the blend's sequences."""

    def __str__(self) -> str:
        """Return the corpus's directory and the range of lengths."""
        has_all = self.config.lengths.has_all
        return self.config.path + ("" if has_all else f" (documents of {self.config.lengths})")


class BlendedStream:
    """The endless stream of the sequences of all sources, indexed from 0. Thread-safe.

    sources: at least one, in the order of the recipe.
    """

    def __init__(self, configs: collections.abc.Sequence[SourceConfig], streams: list[SequenceStream]) -> None:
        """Blend `streams`, of one sequence length and tokenizer, by the weights of `configs`."""
        self._order = BlendOrder([config.weight for config in configs])
        self.sources = tuple(
            BlendSource(config, stream, self._order.share(number))
            for number, (config, stream) in enumerate(zip(configs, streams, strict=True))
        )

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.sources[0].stream.sequence_length

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer of all corpora."""
        return self.sources[0].stream.documents.corpus.manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that determines the tokens of sequence i."""
        return _blended([source.stream.fingerprint for source in self.sources], self._order)

    @property
    def sequences_per_epoch(self) -> float:
        """Sequences after which each source has been read to its end at least once, usually a fraction."""
        return max(source.stream.sequences_per_epoch / source.share for source in self.sources)

    def counts(self, count: int) -> list[int]:
        """Return how many of the first `count` sequences are of each source."""
        return self._order.counts(count)

    def epochs(self, count: int) -> list[float]:
        """Return how often each source has been read after the first `count` sequences."""
        pairs = zip(self.counts(count), self.sources, strict=True)
        return [own / source.stream.sequences_per_epoch for own, source in pairs]

    def __getitem__(self, index: int) -> Sequence:
        """Return sequence `index`, any integer from 0.

        Raises UserError, naming the shard, if its corpus cannot be read.
        """
        if index < 0:
            raise IndexError(f"sequence {index}: a stream begins at 0 and has no end")
        source, number = self._order.locate(index)
        return replace(self.sources[source].stream[number], index=index)


class HeldoutSequences(collections.abc.Sequence[Sequence]):
    """The first sequences of a blend of held-out splits, read on access."""

    def __init__(self, stream: BlendedStream, count: int) -> None:
        """Take the first `count` sequences of `stream`."""
        self._stream = stream
        self._count = count

    @property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of the documents and the weights."""
        documents = [source.stream.documents.fingerprint for source in self._stream.sources]
        return _blended(documents, BlendOrder([source.config.weight for source in self._stream.sources]))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> Sequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...
    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        """Return a sequence, or those of a slice."""
        numbers = range(self._count)[index]
        return self._stream[numbers] if isinstance(numbers, int) else [self._stream[number] for number in numbers]


def train_stream(config: DataConfig, *, seed: int) -> BlendedStream:
    """Open the training stream of a recipe's `[data]`.

    Raises UserError if a directory is not a complete corpus, a source has fewer tokens than one sequence, or tokenizers
    differ.
    """
    return _open(config, "train", seed, None if config.shuffle_window == "none" else config.shuffle_window)


def heldout_sequences(config: DataConfig, count: int) -> HeldoutSequences:
    """Return `count` evaluation sequences, the same ones each time: the first of the blend of the held-out splits.

    Weights and ranges of lengths are those of training. Documents are in a fixed random order, because neighbours in
    the stored order are often similar. No document is read twice: if a source has too few for `count` sequences of the
    blend, the result is shorter (see `len`). Raises UserError if a source has none, and as `train_stream`.
    """
    stream = _open(config, "heldout", 0, SHUFFLE_WINDOW)
    whole = [int(source.stream.sequences_per_epoch) for source in stream.sources]

    def repeats(number: int) -> bool:
        return any(own > most for own, most in zip(stream.counts(number + 1), whole, strict=True))

    return HeldoutSequences(stream, bisect_left(range(count), True, key=repeats))


def train_fingerprint(config: DataConfig, manifests: list[Manifest], *, seed: int) -> str:
    """Return `train_stream(config, seed=seed).fingerprint` from the sources' manifests, without opening a shard."""
    window, fingerprints = config.shuffle_window, []
    for number, (source, manifest) in enumerate(zip(config.sources, manifests, strict=True)):
        order = None if window == "none" else Shuffling(seed, window, number)
        documents = source.lengths.fingerprint(manifest.fingerprint("train"))
        fingerprints.append(stream_fingerprint(documents, config.sequence_length, order))
    return _blended(fingerprints, BlendOrder([source.weight for source in config.sources]))


def repetition_warnings(stream: BlendedStream, count: int) -> list[str]:
    """Return a sentence per source that the first `count` sequences read more often than is worthwhile."""
    return [
        f"{source} is read {epochs:,.1f} times in {count:,} sequences: beyond about {WORTHWHILE_EPOCHS} epochs "
        "repeated tokens teach less and less (Muennighoff et al. 2023). Prepare more text"
        + (", or lower its weight" if len(stream.sources) > 1 else "")
        for source, epochs in zip(stream.sources, stream.epochs(count), strict=True)
        if epochs > WORTHWHILE_EPOCHS
    ]


def _open(config: DataConfig, split: SplitName, seed: int, window: int | None) -> BlendedStream:
    """Open the streams of all sources; `window`: None: documents in their stored order."""
    paths = [source.path for source in config.sources]
    corpora: dict[str, Corpus] = {}
    streams = []
    for number, source in enumerate(config.sources):
        try:
            if source.path not in corpora:
                # Per source two windows: the current one and, at its end, the next.
                cached = 2 * (window or SHUFFLE_WINDOW) * paths.count(source.path)
                corpora[source.path] = Corpus(source.path, split, cache_tokens=cached)
            stream = SequenceStream(
                corpora[source.path],
                config.sequence_length,
                seed=seed,
                shuffle=window is not None,
                shuffle_window=window or SHUFFLE_WINDOW,
                lengths=source.lengths,
                source=number,
            )
        except UserError as error:
            if not config.mix:
                raise
            raise UserError(f"data.mix[{number}]: {error}") from error
        streams.append(stream)
    _check_tokenizers({path: corpus.manifest for path, corpus in corpora.items()})
    return BlendedStream(config.sources, streams)


def _check_tokenizers(manifests: dict[str, Manifest]) -> None:
    """Raise UserError, naming two corpora, unless all have the tokenizer and the end token of the first."""
    (first, expected), *others = manifests.items()
    for path, manifest in others:
        own, other = expected.tokenizer, manifest.tokenizer
        if (own.fingerprint, own.eos_id) != (other.fingerprint, other.eos_id):
            raise UserError(
                f"data.mix: {first} has the tokenizer {own.name} (end token {own.eos_id}), {path} has {other.name} "
                f"(end token {other.eos_id}), which is not the same: prepare all corpora of a mix with one tokenizer"
            )


def _blended(fingerprints: list[str], order: BlendOrder) -> str:
    """Return the fingerprint of a blend from those of its sources, in order; that of a single source is its own."""
    if len(fingerprints) == 1:
        return fingerprints[0]
    ratio = ":".join(map(str, order.ratio))
    return hashlib.sha256(f"{' '.join(fingerprints)} in the ratio {ratio}".encode()).hexdigest()

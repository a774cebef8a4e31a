"""Blended streams: packed sequences of one source each, functions of their index, of one tokenizer."""

import pytest
import torch
from pydantic import ValidationError

from longctx.data.blend import heldout_sequences, repetition_warnings, train_fingerprint, train_stream
from longctx.data.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.loader import SequenceStream
from longctx.data.manifest import Manifest
from longctx.errors import UserError
from tests.data.cases import corpus_of, document_of

T = 8


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """`a` and `b` with documents of 2 to 40 tokens, in both splits; `none`, without held-out documents."""
    root = tmp_path_factory.mktemp("corpora")
    for name, lengths in {"a": [10, 3, 30, 7] * 4, "b": [40, 2, 5] * 3}.items():
        corpus_of(root / name, lengths)
        heldout = corpus_of(root / f"{name}-heldout", lengths, split="heldout")
        train, other = Manifest.read(root / name), Manifest.read(heldout)
        (heldout / "heldout").rename(root / name / "heldout")
        Manifest(**dict(train) | {"splits": {**train.splits, "heldout": other.splits["heldout"]}}).save(root / name)
    corpus_of(root / "none", [10] * 9)
    return root


def config(corpora, *sources, **options):
    """`[data]` with these (name, weight) or (name, weight, shortest, longest) as its mix."""
    keys = ("path", "weight", "min_document", "max_document")
    mix = [dict(zip(keys, (str(corpora / name), *rest), strict=False)) for name, *rest in sources]
    return DataConfig(**{"mix": tuple(mix), "sequence_length": T} | options)


def equal(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "labels", "cu_seqlens"))


def test_each_sequence_is_the_next_one_of_one_source(corpora):
    stream = train_stream(config(corpora, ("a", 2.0), ("b", 1.0)), seed=3)
    alone = [SequenceStream(Corpus(corpora / name), T, seed=3, source=number) for number, name in enumerate(("a", "b"))]
    read = [0, 0]
    for index in range(90):
        sequence = stream[index]
        (source,) = [n for n in (0, 1) if stream.counts(index + 1)[n] > stream.counts(index)[n]]
        assert sequence.index == index
        assert equal(sequence, alone[source][read[source]])
        read[source] += 1
    assert read == [60, 30]
    with pytest.raises(IndexError, match="begins at 0"):
        stream[-1]


def test_ranks_that_read_their_own_sequences_read_what_one_rank_reads(corpora):
    data = config(corpora, ("a", 0.7), ("b", 0.2, 5), ("b", 0.1, 1, 5))
    one = train_stream(data, seed=1)
    expected = [one[index] for index in range(60)]
    for rank in range(3):
        own = train_stream(data, seed=1)
        for index in reversed(range(rank, 60, 3)):  # in any order, as a resumed rank that begins anywhere
            assert equal(own[index], expected[index])
            assert own[index].index == index


def test_one_corpus_is_a_blend_of_one_source(corpora):
    path = DataConfig(path=str(corpora / "a"), sequence_length=T)
    for data in (path, config(corpora, ("a", 0.25))):
        stream, alone = train_stream(data, seed=4), SequenceStream(Corpus(corpora / "a"), T, seed=4)
        assert (stream.fingerprint, stream.sequences_per_epoch) == (alone.fingerprint, alone.sequences_per_epoch)
        assert all(equal(stream[index], alone[index]) for index in range(60))


def test_two_length_ranges_of_one_corpus(corpora):
    stream = train_stream(config(corpora, ("a", 1.0, 1, 9), ("a", 1.0, 10)), seed=1)
    short, long = ({t for n in range(16) for t in document_of(n, size)} for size in (7, 30))
    for index in range(40):
        sequence = set(stream[index].tokens.tolist())
        assert sequence <= (long if stream.counts(index + 1)[1] > stream.counts(index)[1] else short)
    assert stream.sources[0].stream.documents.corpus is stream.sources[1].stream.documents.corpus, "opened once"


def test_the_recipe_asks_for_a_stream(corpora):
    path = str(corpora / "a")
    shuffled = train_stream(DataConfig(path=path, sequence_length="16"), seed=4)
    assert shuffled.fingerprint == SequenceStream(Corpus(path), 16, seed=4).fingerprint
    stored = train_stream(DataConfig(path=path, sequence_length=16, shuffle_window="none"), seed=4)
    assert stored.fingerprint == SequenceStream(Corpus(path), 16, seed=4, shuffle=False).fingerprint
    small = train_stream(DataConfig(path=path, sequence_length=16, shuffle_window="1Ki"), seed=4)
    assert small.fingerprint == SequenceStream(Corpus(path), 16, seed=4, shuffle_window=1024).fingerprint
    with pytest.raises(ValidationError, match="greater than 0"):
        DataConfig(path=path, sequence_length=16, shuffle_window=0)


def test_the_fingerprint_names_all_that_the_cursor_depends_on(corpora):
    variants = [
        (config(corpora, ("a", 2.0), ("b", 1.0)), 1),
        (config(corpora, ("a", 3.0), ("b", 1.0)), 1),
        (config(corpora, ("b", 1.0), ("a", 2.0)), 1),
        (config(corpora, ("a", 2.0), ("b", 1.0, 3)), 1),
        (config(corpora, ("a", 2.0), ("b", 1.0, 1, 30)), 1),
        (config(corpora, ("a", 2.0), ("none", 1.0)), 1),
        (config(corpora, ("a", 2.0), ("b", 1.0), sequence_length=9), 1),
        (config(corpora, ("a", 2.0), ("b", 1.0), shuffle_window=4), 1),
        (config(corpora, ("a", 2.0), ("b", 1.0), shuffle_window="none"), 1),
        (config(corpora, ("a", 2.0), ("b", 1.0)), 2),
    ]
    found = [train_stream(data, seed=seed).fingerprint for data, seed in variants]
    assert len(set(found)) == len(variants)
    again = train_stream(config(corpora, ("a", 0.2), ("b", 0.1)), seed=1)
    assert again.fingerprint == found[0], "weights are relative"
    for (data, seed), want in zip(variants, found, strict=True):
        manifests = [Manifest.read(source.path) for source in data.sources]
        assert train_fingerprint(data, manifests, seed=seed) == want, "from the manifests alone"


@pytest.mark.parametrize("window", ["none", 16, 2**24])
def test_the_fingerprint_of_one_corpus_needs_the_manifest_alone(corpora, window):
    data = DataConfig(path=str(corpora / "a"), sequence_length=8, shuffle_window=window)
    manifests, want = [Manifest.read(corpora / "a")], train_stream(data, seed=3).fingerprint
    assert train_fingerprint(data, manifests, seed=3) == want
    assert (train_fingerprint(data, manifests, seed=4) == want) == (window == "none")


# Held-out sequences


def test_heldout_sequences_are_the_same_each_time(tmp_path):
    path = str(corpus_of(tmp_path / "corpus", [10, 3, 30], split="heldout"))
    few, again = (heldout_sequences(DataConfig(path=path, sequence_length=8), 2) for _ in range(2))
    assert len(few) == 2
    assert [sequence.tokens.tolist() for sequence in few] == [sequence.tokens.tolist() for sequence in again]
    (all_,) = heldout_sequences(DataConfig(path=path, sequence_length=43), 1)
    assert sorted(all_.tokens.tolist()) == sorted(t for n, size in enumerate((10, 3, 30)) for t in document_of(n, size))
    assert torch.equal(few[-1].tokens, few[1].tokens)
    most = heldout_sequences(DataConfig(path=path, sequence_length=8), 99)
    assert [sequence.index for sequence in most] == [0, 1, 2, 3, 4]
    assert most.fingerprint == Corpus(path, "heldout").fingerprint
    with pytest.raises(UserError, match="'heldout' has 43 tokens, less than one sequence of 44"):
        heldout_sequences(DataConfig(path=path, sequence_length=44), 1)


def test_heldout_sequences_of_a_mix_have_its_shares_and_ranges_and_repeat_nothing(corpora):
    data = config(corpora, ("a", 3.0), ("b", 1.0, 1, 9))  # b has 21 tokens in range: 2 sequences
    found = heldout_sequences(data, 99)
    sources = [source.stream for source in found._stream.sources]
    assert found._stream.counts(len(found))[1] == 2
    assert found._stream.counts(len(found) + 1)[1] == 3
    assert len(heldout_sequences(data, 5)) == 5
    assert {source.documents.corpus.split for source in sources} == {"heldout"}
    assert sources[1].documents.tokens == 21
    others = (config(corpora, ("a", 2.0), ("b", 1.0, 1, 9)), config(corpora, ("a", 3.0), ("b", 1.0)))
    assert len({each.fingerprint for each in (found, *(heldout_sequences(other, 2) for other in others))}) == 3


def test_a_source_without_heldout_documents_is_named(corpora):
    with pytest.raises(UserError, match=r"data\.mix\[1\]: .*none: the split 'heldout' has no documents"):
        heldout_sequences(config(corpora, ("a", 1.0), ("none", 1.0)), 2)


# What does not fit


def test_a_source_without_enough_tokens_is_named(corpora):
    with pytest.raises(
        UserError, match=r"data\.mix\[1\]: .*b: the split 'train' has 0 tokens in 0 documents of at least 41 tokens"
    ):
        train_stream(config(corpora, ("a", 1.0), ("b", 1.0, 41)), seed=1)


def test_a_source_that_is_not_there_is_named(corpora):
    with pytest.raises(UserError, match=r"data\.mix\[1\]: data directory .*gone does not exist"):
        train_stream(config(corpora, ("a", 1.0), ("gone", 1.0)), seed=1)
    with pytest.raises(UserError, match=r"^data directory .*gone does not exist"):
        train_stream(DataConfig(path=str(corpora / "gone"), sequence_length=T), seed=1)


@pytest.mark.parametrize("other", [{"fingerprint": "0" * 64, "name": "another"}, {"eos_id": 0}])
def test_corpora_of_two_tokenizers_are_named(corpora, tmp_path, other):
    path = corpus_of(tmp_path / "other", [20])
    manifest = Manifest.read(path)
    tokenizer = manifest.tokenizer.model_copy(update=other)
    Manifest(**dict(manifest) | {"tokenizer": tokenizer}).save(path)
    message = rf"data\.mix: .*a has the tokenizer bytes \(end token 256\), {path} has {tokenizer.name} \(end token"
    with pytest.raises(UserError, match=message):
        train_stream(config(corpora, ("a", 1.0), (path, 1.0)), seed=1)


# Repetition


def test_epochs_are_counted_per_source_and_many_are_warned_of(corpora):
    stream = train_stream(config(corpora, ("a", 1.0), ("b", 3.0, 30)), seed=1)  # 200 tokens, and 120
    assert [source.share for source in stream.sources] == [0.25, 0.75]
    assert stream.epochs(80) == pytest.approx([20 * T / 200, 60 * T / 120])
    assert stream.sequences_per_epoch == 200 / T * 4
    assert repetition_warnings(stream, 80) == []
    (warning,) = repetition_warnings(stream, 84)
    assert warning.startswith(f"{corpora / 'b'} (documents of at least 30 tokens) is read 4.2 times in 84 sequences")
    assert warning.endswith("or lower its weight")
    (alone,) = repetition_warnings(train_stream(config(corpora, ("a", 1.0)), seed=1), 101)
    assert alone.endswith("Prepare more text")

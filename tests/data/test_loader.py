"""Sequences: every token of an epoch once, labels that cross sequences, an order that depends on the seed alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from longctx.data.config import DataConfig
from longctx.data.corpus import Corpus
from longctx.data.loader import SequenceStream, heldout_sequences, train_fingerprint, train_stream
from longctx.errors import UserError
from tests.data.cases import END, corpus_of, document_of


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Makes a corpus of documents of given lengths, in a directory of its own."""
    root = tmp_path_factory.mktemp("corpora")
    return lambda lengths, **options: Corpus(corpus_of(root / str(len(list(root.iterdir()))), lengths, **options))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    length=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    window=st.integers(1, 200),
    shuffle=st.booleans(),
)
def test_an_epoch_holds_every_document_once(fresh, lengths, length, seed, window, shuffle):
    corpus = fresh(lengths)
    if corpus.tokens < length:
        with pytest.raises(UserError, match=f"{corpus.tokens} tokens, less than one sequence of {length}"):
            SequenceStream(corpus, length, seed=seed)
        return
    stream = SequenceStream(corpus, length, seed=seed, shuffle=shuffle, shuffle_window=window)
    sequences = [stream[i] for i in range(-(-3 * corpus.tokens // length))]
    tokens = torch.cat([sequence.tokens for sequence in sequences]).numpy()
    labels = torch.cat([sequence.labels for sequence in sequences]).numpy()
    for epoch in range(3):
        found = tokens[epoch * corpus.tokens : (epoch + 1) * corpus.tokens]
        documents = np.split(found, np.flatnonzero(found == END) + 1)[:-1]
        expected = [document_of(number, length).tolist() for number, length in enumerate(lengths)]
        in_order = [document.tolist() for document in documents]
        assert sorted(in_order) == sorted(expected)
        assert shuffle or in_order == expected
    # A label is the token after, over the seams of sequences too, except after a document's end.
    np.testing.assert_array_equal(labels[:-1], np.where(tokens[:-1] == END, -100, tokens[1:]))


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), length=st.integers(1, 50), seed=st.integers(0, 9))
def test_cu_seqlens_say_where_documents_begin(fresh, lengths, length, seed):
    corpus = fresh(lengths)
    if corpus.tokens < length:
        return
    stream = SequenceStream(corpus, length, seed=seed)
    for index in range(int(2 * stream.sequences_per_epoch) + 1):
        sequence = stream[index]
        assert sequence.index == index
        assert sequence.tokens.shape == sequence.labels.shape == (length,)
        assert sequence.tokens.dtype == sequence.labels.dtype == sequence.cu_seqlens.dtype == torch.int64
        ends = (sequence.tokens == END).nonzero().flatten() + 1
        assert sequence.cu_seqlens.tolist() == [0, *ends[ends < length].tolist(), length]


def test_a_long_document_continues_in_the_next_sequences(fresh):
    stream = SequenceStream(fresh([10, 3]), 4, seed=0, shuffle=False)
    long, short = document_of(0, 10).tolist(), document_of(1, 3).tolist()
    first, second, third = (stream[i] for i in range(3))
    assert first.tokens.tolist() == long[:4]
    assert first.labels.tolist() == long[1:5]
    assert second.cu_seqlens.tolist() == [0, 4]
    assert third.tokens.tolist() == [*long[8:], *short[:2]]
    assert third.labels.tolist() == [END, -100, *short[1:]]
    assert third.cu_seqlens.tolist() == [0, 2, 4]


def test_the_tail_of_an_epoch_shares_a_sequence_with_the_next(fresh):
    stream = SequenceStream(fresh([10, 3]), 4, seed=0, shuffle=False)
    assert stream[3].tokens.tolist() == [END, *document_of(0, 10)[:3].tolist()]
    assert stream[3].cu_seqlens.tolist() == [0, 1, 4]
    assert stream.sequences_per_epoch == 3.25  # 13 tokens in sequences of 4


def test_any_sequence_at_any_time(fresh):
    corpus = fresh([7, 30, 4, 4, 19, 2, 60, 5] * 4)
    ahead = SequenceStream(corpus, 11, seed=3)
    wanted = [ahead[index] for index in range(200)]
    for index in (150, 3, 199, 0, 77, 78):
        found = SequenceStream(corpus, 11, seed=3)[index]
        assert torch.equal(found.tokens, wanted[index].tokens)
        assert torch.equal(found.labels, wanted[index].labels)
        assert torch.equal(found.cu_seqlens, wanted[index].cu_seqlens)
    assert ahead[10**12].index == 10**12
    with pytest.raises(IndexError, match="begins at 0"):
        ahead[-1]


def order(stream, epoch=0):
    """The documents of an epoch."""
    return stream._permutation(epoch).tolist()


def test_the_order_depends_on_seed_and_epoch(fresh):
    corpus = fresh([8] * 100)
    stream = SequenceStream(corpus, 8, seed=1)
    orders = [order(stream), order(stream, 1), order(SequenceStream(corpus, 8, seed=2)), list(range(100))]
    assert len(set(map(tuple, orders))) == 4
    assert order(SequenceStream(corpus, 16, seed=1)) == orders[0]


def test_the_order_is_the_same_on_every_machine(fresh):
    """Written down once: a change of it would make every checkpoint's cursor mean other tokens."""
    stream = SequenceStream(fresh([8] * 12), 8, seed=1, shuffle_window=48)
    assert order(stream) == [int(number) for number in ["10", "8", "11", "9", "5", "4", "3", "6", "1", "2", "7", "0"]]


def test_the_order_stays_within_windows_of_row_groups(fresh):
    corpus = fresh([8] * 400, row_group_tokens=80, shard_tokens=1000)
    found = order(SequenceStream(corpus, 8, seed=5, shuffle_window=320))
    windows = [{document // 10 for document in found[start : start + 40]} for start in range(0, 400, 40)]
    assert all(len(groups) == 4 for groups in windows)
    assert set.union(*windows) == set(range(40))
    assert any(max(groups) - min(groups) > 20 for groups in windows)  # from all over the corpus
    first = [document // 10 for document in found[:40]]
    assert sum(a != b for a, b in pairwise(first)) > 10  # and mixed


def test_each_row_group_is_read_once_an_epoch(fresh, monkeypatch):
    corpus = fresh([8] * 400, row_group_tokens=80, shard_tokens=1000)
    stream = SequenceStream(corpus, 20, seed=5, shuffle_window=320)
    corpus._cache_tokens = 2 * 320
    decoded = []
    decode = corpus._decode
    monkeypatch.setattr(corpus, "_decode", lambda group: decoded.append(group) or decode(group))
    for index in range(160):
        stream[index]
    assert sorted(decoded) == list(range(40))


@pytest.mark.parametrize("window", ["none", 16, 2**24])
def test_the_fingerprint_needs_the_manifest_alone(fresh, window):
    corpus = fresh([5, 9, 30])
    config = DataConfig(path=str(corpus.directory), sequence_length=8, shuffle_window=window)
    want = train_stream(config, seed=3).fingerprint
    assert train_fingerprint(corpus.manifest, config, seed=3) == want
    assert (train_fingerprint(corpus.manifest, config, seed=4) == want) == (window == "none")


def test_the_fingerprint_names_all_that_the_cursor_depends_on(fresh):
    corpus, other = fresh([8] * 10), fresh([8] * 11)
    streams = [
        SequenceStream(corpus, 8, seed=1),
        SequenceStream(other, 8, seed=1),
        SequenceStream(corpus, 9, seed=1),
        SequenceStream(corpus, 8, seed=2),
        SequenceStream(corpus, 8, seed=1, shuffle_window=4),
        SequenceStream(corpus, 8, seed=1, shuffle=False),
    ]
    assert len({stream.fingerprint for stream in streams}) == 6
    assert SequenceStream(Corpus(corpus.directory), 8, seed=1).fingerprint == streams[0].fingerprint
    assert SequenceStream(corpus, 8, seed=2, shuffle=False).fingerprint == streams[5].fingerprint


def test_heldout_sequences_are_the_same_each_time(tmp_path):
    corpus = Corpus(corpus_of(tmp_path / "corpus", [10, 3, 30], split="heldout"), "heldout")
    few, again = heldout_sequences(corpus, 8, 2), heldout_sequences(corpus, 8, 2)
    assert len(few) == 2
    assert [sequence.tokens.tolist() for sequence in few] == [sequence.tokens.tolist() for sequence in again]
    whole = torch.cat([sequence.tokens for sequence in heldout_sequences(corpus, 43, 1)]).tolist()
    assert sorted(whole) == sorted(
        token for n, size in enumerate((10, 3, 30)) for token in document_of(n, size).tolist()
    )
    assert torch.equal(few[-1].tokens, few[1].tokens)
    assert [sequence.index for sequence in heldout_sequences(corpus, 8, 99)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="'heldout' has 43 tokens, less than one sequence of 44"):
        heldout_sequences(corpus, 44, 1)


def test_the_recipe_asks_for_a_stream(fresh):
    path = str(fresh([8] * 100).directory)
    shuffled = train_stream(DataConfig(path=path, sequence_length="16"), seed=4)
    assert shuffled.fingerprint == SequenceStream(Corpus(path), 16, seed=4).fingerprint
    stored = train_stream(DataConfig(path=path, sequence_length=16, shuffle_window="none"), seed=4)
    assert order(stored) == list(range(100))
    assert order(shuffled) != order(stored)
    small = train_stream(DataConfig(path=path, sequence_length=16, shuffle_window="1Ki"), seed=4)
    assert small.fingerprint != shuffled.fingerprint
    with pytest.raises(ValidationError, match="greater than 0"):
        DataConfig(path=path, sequence_length=16, shuffle_window=0)
    with pytest.raises(UserError, match="does not exist"):
        train_stream(DataConfig(path=path + "-missing", sequence_length=16), seed=4)


def test_bad_numbers_are_refused(fresh):
    corpus = fresh([8])
    for length, seed, window in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(UserError, match="must be above 0"):
            SequenceStream(corpus, length, seed=seed, shuffle_window=window)

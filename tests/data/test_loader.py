"""Sequences: every token of an epoch once, labels that cross sequences, an order that depends on the seed alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.corpus import Corpus
from longctx.data.length_range import LengthRange
from longctx.data.loader import SequenceStream
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


def test_the_fingerprint_names_all_that_the_cursor_depends_on(fresh):
    corpus, other = fresh([8] * 10), fresh([8] * 11)
    streams = [
        SequenceStream(corpus, 8, seed=1),
        SequenceStream(other, 8, seed=1),
        SequenceStream(corpus, 9, seed=1),
        SequenceStream(corpus, 8, seed=2),
        SequenceStream(corpus, 8, seed=1, shuffle_window=4),
        SequenceStream(corpus, 8, seed=1, shuffle=False),
        SequenceStream(corpus, 8, seed=1, lengths=LengthRange(2)),
        SequenceStream(corpus, 8, seed=1, lengths=LengthRange(1, 9)),
    ]
    assert len({stream.fingerprint for stream in streams}) == 8
    assert SequenceStream(Corpus(corpus.directory), 8, seed=1).fingerprint == streams[0].fingerprint
    assert SequenceStream(corpus, 8, seed=2, shuffle=False).fingerprint == streams[5].fingerprint


# Documents in a range of lengths


def documents_read(stream, epochs=1):
    """The documents of the first epochs, each as its tokens."""
    total = stream.documents.tokens * epochs
    sequences = [stream[index].tokens for index in range(-(-total // stream.sequence_length))]
    tokens = torch.cat(sequences).numpy()[:total]
    return [found.tolist() for found in np.split(tokens, np.flatnonzero(tokens == END) + 1)[:-1]]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    bounds=st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted),
    window=st.integers(1, 200),
    shuffle=st.booleans(),
)
def test_documents_out_of_range_are_left_out(fresh, lengths, bounds, window, shuffle):
    corpus, (shortest, longest) = fresh(lengths), bounds
    options = {"seed": 1, "shuffle": shuffle, "shuffle_window": window, "lengths": LengthRange(shortest, longest)}
    expected = [document_of(n, size).tolist() for n, size in enumerate(lengths) if shortest <= size <= longest]
    if not expected:
        with pytest.raises(UserError, match="has 0 tokens in 0 documents of"):
            SequenceStream(corpus, 1, **options)
        return
    found = documents_read(SequenceStream(corpus, 1, **options))
    assert sorted(found) == sorted(expected)
    assert shuffle or found == expected


def test_a_range_without_enough_tokens_is_named_with_what_there_is(fresh):
    corpus = fresh([10, 30, 12, 3])
    with pytest.raises(UserError) as caught:
        SequenceStream(corpus, 64, seed=1, lengths=LengthRange(10, 20))
    assert str(caught.value).startswith(
        f"{corpus.directory}: the split 'train' has 22 tokens in 2 documents of 10 to 20 tokens"
    )
    assert ", less than one sequence of 64; its longest document has 30 tokens. Change min_document or" in str(
        caught.value
    )


def test_windows_are_of_stored_tokens_so_that_each_row_group_is_read_once_an_epoch(fresh, monkeypatch):
    """A window of the documents in range alone would span all row groups, and the corpus's cache holds a few."""
    corpus = fresh([60, 8, 8, 4] * 40, row_group_tokens=80, shard_tokens=1000)
    stream = SequenceStream(corpus, 4, seed=5, shuffle_window=320, lengths=LengthRange(1, 4))
    corpus._cache_tokens = 2 * 320
    decoded = []
    decode = corpus._decode
    monkeypatch.setattr(corpus, "_decode", lambda group: decoded.append(group) or decode(group))
    for index in range(40):
        stream[index]
    assert sorted(decoded) == list(range(40))


def test_each_source_of_a_blend_has_an_order_of_its_own(fresh):
    corpus = fresh([8] * 100)
    streams = [SequenceStream(corpus, 8, seed=1, source=source) for source in range(3)]
    assert len({tuple(order(stream)) for stream in streams}) == 3
    assert len({stream.fingerprint for stream in streams}) == 3
    assert order(streams[0]) == order(SequenceStream(corpus, 8, seed=1))

"""From numbers of sequences to batches: each once over the ranks, read ahead, faults told."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.data.loader import Sequence
from longctx.errors import UserError
from longctx.parallel.mesh import Mesh
from longctx.train.batches import Cursor, Prefetcher, to_batch


@given(per_rank=st.integers(1, 5), begin=st.integers(0, 1000), steps=st.integers(1, 4))
def test_any_number_of_ranks_reads_the_same_sequences_each_once(per_rank, begin, steps):
    per_step = 4 * per_rank
    cursor = Cursor(begin)
    for step in range(steps):
        want = list(range(begin + step * per_step, begin + (step + 1) * per_step))
        for dp in (1, 2, 4):
            shares = [list(cursor.step(per_step, dp, rank)) for rank in range(dp)]
            assert {len(share) for share in shares} == {per_step // dp}
            assert sorted(itertools.chain(*shares)) == want
        cursor = cursor.after(per_step)
    assert cursor == Cursor(begin + steps * per_step)


class Stream:
    """Sequences that say their number, and which thread read them; those from 100 on cannot be read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, number):
        if number >= 100:
            raise UserError(f"shard of sequence {number} is cut short")
        self.read.append((number, threading.current_thread()))
        return number


@pytest.fixture
def stream_and_prefetcher():
    stream = Stream()
    prefetcher = Prefetcher(stream, lambda sequence: ("batch", sequence))
    yield stream, prefetcher
    prefetcher.close()


def test_what_is_taken_is_what_was_asked_for_in_order_and_read_once(stream_and_prefetcher):
    stream, prefetcher = stream_and_prefetcher
    assert prefetcher.take(range(1, 6, 2)) == [("batch", 1), ("batch", 3), ("batch", 5)]
    for numbers in (range(7, 9), range(9, 11), range(11, 12)):
        prefetcher.request(numbers)
    assert prefetcher.take(range(9, 11)) == [("batch", 9), ("batch", 10)]
    assert prefetcher.take(range(7, 9)) == [("batch", 7), ("batch", 8)]
    assert prefetcher.take(range(11, 12)) == [("batch", 11)]
    assert [number for number, _ in stream.read] == [1, 3, 5, 7, 8, 9, 10, 11]


def test_reading_continues_in_a_thread_while_the_caller_computes(stream_and_prefetcher):
    stream, prefetcher = stream_and_prefetcher
    prefetcher.request(range(3))
    prefetcher.close()
    assert [number for number, _ in stream.read] == [0, 1, 2]
    assert threading.current_thread() not in {thread for _, thread in stream.read}


def test_what_reading_raises_reaches_the_caller_when_it_takes(stream_and_prefetcher):
    _, prefetcher = stream_and_prefetcher
    prefetcher.request(range(99, 101))
    prefetcher.request(range(2))
    assert prefetcher.take(range(2)) == [("batch", 0), ("batch", 1)]
    with pytest.raises(UserError, match="shard of sequence 100 is cut short"):
        prefetcher.take(range(99, 101))
    assert prefetcher.take(range(2)) == [("batch", 0), ("batch", 1)]


def packed():
    numbers = torch.arange(8)
    return Sequence(numbers, numbers + 1, torch.tensor([0, 3, 8]), 5)


def batch_here(order):
    batch = to_batch(packed(), Mesh.build("cpu", cp=2), order, torch.device("cpu"))
    return batch.tokens, batch.labels, batch.layout.cu_seqlens, batch.layout.positions


@pytest.mark.parametrize(
    ("order", "tokens"), [("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]), ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]])]
)
def test_a_batch_holds_the_ranks_own_tokens_with_the_labels_that_the_whole_sequence_gave_them(ranks, order, tokens):
    answers = ranks.run(batch_here, order, size=2)
    for mine, (got, labels, bounds, positions) in zip(tokens, answers, strict=True):
        assert got.tolist() == [mine]
        assert labels.tolist() == [[t + 1 for t in mine]]
        assert bounds == (0, 3, 8)
        assert positions.tolist() == [t if t < 3 else t - 3 for t in mine]

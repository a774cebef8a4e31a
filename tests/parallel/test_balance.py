"""Giving out pieces: equal tokens, nearly equal causal work, the same on every rank."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.balance import TOLERANCE, balanced_owners, causal_work, imbalance
from longctx.parallel.layout import Layout


def realistic(length, seed):
    """Documents of lengths as web text and code have them, packed: log-normal, some as long as the sequence."""
    chance = random.Random(seed)
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + max(1, int(chance.lognormvariate(7.5, 2.0)))))
    return tuple(bounds)


def spread(bounds, order, size):
    work = [score_elements(Layout(bounds, order, size, rank)) for rank in range(size)]
    return max(work) * size / sum(work) - 1


@given(st.sets(st.integers(1, 99)), st.sets(st.integers(0, 100), min_size=1))
def test_work_is_that_of_the_causal_document_mask(inner, edges):
    bounds, edges = (0, *sorted(inner), 100), sorted(edges)
    want = []
    for begin, end in itertools.pairwise(edges):
        starts = [max(b for b in bounds if b <= t) for t in range(begin, end)]
        want.append(sum(t - start + 1 for t, start in zip(range(begin, end), starts, strict=True)))
    assert causal_work(bounds, edges) == want


@given(st.sets(st.integers(1, 999), max_size=12), st.integers(1, 9))
def test_every_rank_gets_equally_many_pieces(inner, size):
    owners = balanced_owners((0, *sorted(inner), 1000), size)
    assert {owners.count(rank) for rank in range(size)} == {len(owners) // size}


def test_one_document_stays_in_zigzag_order():
    assert balanced_owners((0, 4096), 4) == (0, 1, 2, 3, 3, 2, 1, 0)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_work_on_a_realistic_mix_is_within_a_tenth_of_the_mean(size, seed):
    bounds = realistic(2**18, seed)
    assert spread(bounds, "balanced", size) <= 0.1
    assert spread(bounds, "balanced", size) <= spread(bounds, "zigzag", size)


def test_the_imbalance_is_that_of_the_fullest_rank():
    assert imbalance([3, 1, 1, 1], [0, 1, 0, 1], 2) == pytest.approx(4 / 3 - 1)
    assert TOLERANCE < 0.1

"""Order of a blend: exact shares, each source's sequences once and in order, any of them without those before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.blend_order import BlendOrder

WEIGHTS = st.lists(st.one_of(st.floats(1e-6, 1e6), st.integers(1, 9).map(float)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(weights=WEIGHTS)
def test_after_any_number_of_sequences_each_source_has_its_share_to_within_two(weights):
    order = BlendOrder(weights)
    total, bound = sum(order.ratio), 0.5 if len(weights) < 3 else 2
    seen = [0] * len(weights)
    for index in range(300):
        assert order.counts(index) == seen
        source, number = order.locate(index)
        assert number == seen[source], "no gap, no repeat"
        seen[source] += 1
        for own, ratio in zip(seen, order.ratio, strict=True):
            assert abs(own * total - ratio * (index + 1)) <= bound * total


@settings(deadline=None, max_examples=60)
@given(weights=WEIGHTS, index=st.integers(0, 10**15))
def test_any_sequence_is_found_without_those_before(weights, index):
    order = BlendOrder(weights)
    source, number = order.locate(index)
    before, after = order.counts(index), order.counts(index + 1)
    assert sum(before) == index
    assert number == before[source]
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(n == source) for n in range(len(weights))]


def test_many_sources_of_falling_weights_keep_the_bound():
    """The deepest tree: a node per source."""
    order = BlendOrder([2.0**-n for n in range(12)])
    total = sum(order.ratio)
    for index in range(1, 9000):
        counts = order.counts(index)
        assert all(abs(own * total - r * index) < 2 * total for own, r in zip(counts, order.ratio, strict=True))


@pytest.mark.parametrize(("weights", "block"), [((0.3, 0.7), 10), ((0.1, 0.2, 0.7), 10), ((3, 1, 1, 2), 7), ((5,), 1)])
def test_blocks_of_the_ratio_are_exact(weights, block):
    order = BlendOrder(weights)
    assert sum(order.ratio) == block
    for number in (1, 2, 10**9):
        assert order.counts(number * block) == [number * ratio for ratio in order.ratio]
    assert [order.share(n) for n in range(len(weights))] == pytest.approx([w / sum(weights) for w in weights])


def test_the_scale_of_the_weights_does_not_matter():
    """Decimal texts: as binary fractions, 0.1 and 0.9 are not 1 to 9."""
    orders = [BlendOrder(weights) for weights in ((0.1, 0.9), (1, 9), (1e-7, 9e-7), (10.0, 90.0))]
    assert {order.ratio for order in orders} == {(1, 9)}


def test_the_order_is_the_same_on_every_machine():
    """Written down once: a change of it would make every checkpoint's cursor mean other tokens."""
    order = BlendOrder([0.5, 0.2, 0.3])
    assert "".join(str(order.locate(index)[0]) for index in range(20)) == "02010201020201020102"


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (-1.0,)])
def test_weights_are_above_zero(weights):
    with pytest.raises(ValueError, match="weights must be above 0"):
        BlendOrder(weights)

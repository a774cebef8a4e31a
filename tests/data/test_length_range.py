"""Ranges of document lengths: both ends are in, and every range has a fingerprint of its own."""

import numpy as np
import pytest

from longctx.data.length_range import LengthRange


@pytest.mark.parametrize(
    ("range_", "inside", "text"),
    [
        (LengthRange(), [1, 5, 9], "at least 1 tokens"),
        (LengthRange(5), [5, 9], "at least 5 tokens"),
        (LengthRange(1, 5), [1, 5], "at most 5 tokens"),
        (LengthRange(5, 5), [5], "5 to 5 tokens"),
        (LengthRange(32_768, 65_536), [], "32,768 to 65,536 tokens"),
    ],
)
def test_both_ends_are_in_the_range(range_, inside, text):
    lengths = np.array([1, 5, 9])
    assert lengths[range_.contains(lengths)].tolist() == inside
    assert str(range_) == text


def test_a_range_changes_the_fingerprint_and_all_lengths_do_not():
    ranges = [LengthRange(), LengthRange(2), LengthRange(1, 9), LengthRange(2, 9), LengthRange(29)]
    found = [each.fingerprint("c0") for each in ranges]
    assert found[0] == "c0"
    assert len(set(found)) == len(ranges)

"""Limits of phases: the cap until a few were seen, then many times the longest of their kind, within bounds."""

import pytest

from longctx.health.phase_limits import PhaseLimits


def test_the_first_phases_of_a_kind_have_the_cap():
    limits = PhaseLimits(cap=1000.0)
    for _ in range(3):
        assert limits.limit("step") == 1000.0
        limits.learn("step", 10.0)
    assert limits.limit("step") == 200.0
    assert limits.limit("evaluation") == 1000.0


@pytest.mark.parametrize(
    ("took", "limit"),
    [([0.1, 0.1, 0.2], 120.0), ([10.0, 30.0, 20.0], 600.0), ([100.0, 1.0, 1.0], 1000.0)],
)
def test_the_longest_counts_within_two_minutes_and_the_cap(took, limit):
    limits = PhaseLimits(cap=1000.0)
    for seconds in took:
        limits.learn("step", seconds)
    assert limits.limit("step") == limit


def test_a_cap_below_two_minutes_counts():
    limits = PhaseLimits(cap=5.0)
    for _ in range(3):
        limits.learn("step", 0.1)
    assert limits.limit("step") == 5.0


def test_what_was_long_ago_is_forgotten():
    limits = PhaseLimits(cap=1000.0)
    limits.learn("step", 40.0)
    for _ in range(49):
        limits.learn("step", 10.0)
    assert limits.limit("step") == 800.0
    limits.learn("step", 10.0)
    assert limits.limit("step") == 200.0

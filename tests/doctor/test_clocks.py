"""Clocks: offsets between nodes from round trips."""

import time

import pytest
import torch.distributed as dist

from longctx.doctor.clocks import Offset, check_clocks, from_round_trip, measure_offsets
from longctx.parallel.local_ranks import LocalRanks

SKEW = 7.5


def offsets(leaders: tuple[int, ...]) -> list[Offset]:
    """The last rank's clock is ahead."""
    is_ahead = dist.get_rank() == dist.get_world_size() - 1
    return measure_offsets(leaders, lambda: time.time_ns() + int(SKEW * 1e9) * is_ahead)


def test_a_clock_that_is_ahead_is_measured(ranks: LocalRanks) -> None:
    first, *others = ranks.run(offsets, (0, 1, 3), size=4)
    assert all(other == first for other in others), "every rank knows"
    own, same, ahead = first
    assert own == Offset(0.0, 0.0)
    assert abs(same.offset) <= same.uncertainty < 1.0
    assert abs(ahead.offset - SKEW) <= ahead.uncertainty < 1.0


def test_the_true_offset_is_within_the_uncertainty() -> None:
    """Sent at 100 and received at 110 here; answered there at 1100 at the earliest and 1110 at the latest, if 1000
    ahead."""
    for answered in (1_100, 1_105, 1_110):
        found = from_round_trip(100, answered, 110)
        assert abs(found.offset - 1000e-9) <= found.uncertainty + 1e-15


def test_one_node_has_no_other_clock(ranks: LocalRanks) -> None:
    assert ranks.run(offsets, (0,), size=2) == [[Offset(0.0, 0.0)]] * 2
    assert check_clocks([Offset(0.0, 0.0)], ["a"]) == []


@pytest.mark.parametrize(
    ("offset", "uncertainty", "status"),
    [(0.5, 0.01, "ok"), (1.5, 0.6, "ok"), (1.5, 0.01, "warning"), (-20.0, 0.01, "warning"), (400.0, 0.1, "wrong")],
)
def test_a_skew_beyond_its_uncertainty_is_named(offset: float, uncertainty: float, status: str) -> None:
    (found,) = check_clocks([Offset(0.0, 0.0), Offset(offset, uncertainty)], ["a", "b"])
    assert found.status == status
    if status != "ok":
        assert found.where == "b"
        assert ("ahead of a" if offset > 0 else "behind a") in found.value

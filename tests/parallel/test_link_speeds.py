"""Link speeds: bandwidth and latency from the times of two messages, on a clock that the test sets."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longctx.parallel import link_speeds
from longctx.parallel.link_speeds import ASSUMED, LARGE, REPEATS, SMALL, Speeds, measure_speeds
from longctx.parallel.traffic import count_traffic

SMALL_SECONDS, LARGE_SECONDS = [1e-3, 3e-3, 2e-3], [0.5, 0.25, 0.125]
"""By rank: the median time of a small and of a large message."""


def clock(medians):
    """The readings around each call: the first of each message is long, as are fewer than half of the others."""
    now = 0.0
    for median in medians:
        for seconds in [1e3, 1e2, median, median / 2, *[median] * (REPEATS - 3)]:
            yield now
            now += seconds
            yield now


def measure():
    rank = dist.get_rank()
    readings = clock([SMALL_SECONDS[rank], LARGE_SECONDS[rank]])
    fake = SimpleNamespace(perf_counter=readings.__next__)
    with mock.patch.object(link_speeds, "time", fake), count_traffic() as traffic:
        speeds = measure_speeds(dist.group.WORLD, torch.device("cpu"), 7e9 - rank)
    assert next(readings, None) is None
    return speeds, dict(traffic.calls), traffic.received


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_speeds_of_the_slowest(ranks, size):
    small, large = max(SMALL_SECONDS[:size]), max(LARGE_SECONDS[:size])
    for speeds, calls, received in ranks.run(measure, size=size):
        assert speeds.latency == pytest.approx(small / (size - 1))
        assert speeds.bandwidth == pytest.approx((size - 1) * 4 * (LARGE - SMALL) / (large - small))
        assert speeds.flops == 7e9 - (size - 1)
        # Every message once more than it is timed; then the maxima of two times and of FLOP/s.
        assert calls == {"all_gather": 2 * (REPEATS + 1) + 3}
        assert received == (size - 1) * ((REPEATS + 1) * 4 * (SMALL + LARGE) + 3 * 8)


def test_speeds_are_written_with_their_units():
    assert str(ASSUMED) == "25 GB/s received, 20 us per message, 200 TFLOP/s per rank"
    assert str(Speeds(1.2345e9, 3.2e-3, 4e10)) == "1.23 GB/s received, 3.2e+03 us per message, 0.04 TFLOP/s per rank"

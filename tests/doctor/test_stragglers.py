"""Stragglers: slow ranks are named, and noise is not."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from longctx.bench import rates
from longctx.doctor.stragglers import best_rates, check_rates, measure_rates, slow_ranks
from longctx.doctor.units import flops
from longctx.parallel.local_ranks import LocalRanks

NODES = ["a", "a", "b", "b"]


def rounds(disturbed: int, is_slow: bool) -> tuple[dict[str, list[float]], int]:
    """Rank 2 measures 50 instead of 100 in the first `disturbed` rounds, or in all of them."""
    calls = 0

    def measure() -> float:
        nonlocal calls
        calls += 1
        return 50.0 if dist.get_rank() == 2 and (is_slow or calls <= disturbed) else 100.0

    measures: dict[str, Callable[[], float]] = {"copy": measure}
    return best_rates(measures, 3, 6), calls


@pytest.mark.parametrize(
    ("disturbed", "is_slow", "expected", "calls"),
    [(0, False, 100.0, 3), (2, False, 100.0, 3), (4, False, 100.0, 5), (0, True, 50.0, 6)],
)
def test_a_rank_is_slow_if_it_is_in_every_round(
    ranks: LocalRanks, disturbed: int, is_slow: bool, expected: float, calls: int
) -> None:
    for found in ranks.run(rounds, disturbed, is_slow, size=3):
        assert found == ({"copy": [100.0, 100.0, expected]}, calls)


def test_more_than_5_percent_under_the_median_is_slow() -> None:
    assert slow_ranks([100, 100, 100, 96]) == {}
    assert slow_ranks([100, 120, 100, 94]) == {3: pytest.approx(0.06)}
    assert slow_ranks([100]) == {}


def test_a_slow_rank_is_named_with_its_node() -> None:
    found = check_rates("matmul bfloat16", [4e14, 4e14, 4e14, 3.6e14], flops, NODES, "cuda")
    assert found.status == "warning"
    assert found.value == "400 TFLOP/s per rank (median), 360 TFLOP/s the slowest; rank 3 on b 10 % under"


def test_a_very_slow_rank_is_wrong_and_the_slowest_come_first() -> None:
    found = check_rates("matmul bfloat16", [4e14, 3.6e14, 2e14, 4e14, 4e14], flops, [*NODES, "c"], "cuda")
    assert found.status == "wrong"
    assert found.value.endswith("rank 2 on b 50 % under, rank 1 on a 10 % under")


def test_no_rank_of_a_cpu_is_wrong() -> None:
    assert check_rates("copy", [4e9, 4e9, 1e9], flops, NODES, "cpu").status == "warning"


def test_even_ranks_are_ok() -> None:
    assert check_rates("x", [4e14, 4.1e14], flops, NODES, "cuda").status == "ok"
    assert check_rates("x", [4e14], flops, NODES, "cuda").value == "400 TFLOP/s"


def measure() -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "COPIED", 2**20)
        own, other = measure_rates(torch.device("cpu"), 1, 1, 0.01)
    return [own.rank, other.rank, own.copy_rate, *own.matmul.values(), *other.matmul.values()]


def test_rates_of_all_ranks_are_measured(ranks: LocalRanks) -> None:
    first, second = ranks.run(measure, size=2)
    assert first == second
    assert first[:2] == [0, 1]
    assert len(first) == 7
    assert all(rate > 1e6 for rate in first[2:])

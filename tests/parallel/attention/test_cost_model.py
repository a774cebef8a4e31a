"""The choice of a schedule: what it expects, and that it says so."""

import pytest
import torch

from longctx.kernels.attention.block import CAUSAL_MASK, IntervalMask
from longctx.parallel.attention.cost_model import AttentionShape, ScheduleChoice, estimates
from longctx.parallel.layout import Layout
from longctx.parallel.link_speeds import Speeds, measure_speeds
from longctx.parallel.mesh import Grid, Mesh
from tests.parallel.attention.test_api import HEADS, attend, draw


def layout(size=4, length=4096, order="zigzag", bandwidth=1e9, latency=0.0, flops=1e12, grid=None):
    return Layout((0, length), order, size, grid=grid, speeds=Speeds(bandwidth, latency, flops))


def shape(heads=8, kv_heads=8, window=None):
    return AttentionShape(heads, kv_heads, 128, 128, 2, IntervalMask(window=window))


def by_name(found):
    return {each.schedule: each for each in found}


def test_received_bytes_are_those_of_the_formulas():
    found = by_name(estimates(layout(), shape(kv_heads=2)))
    keys = 1024 * 2 * 256 * 2
    assert found["all-gather"].received == 3 * keys * 2 + 3 * keys * 2
    # 2 query heads and 1 key/value head of 3 other ranks, there and back, forward and backward.
    assert found["ulysses"].received == 2 * 3 * 1024 * (2 * 256 + 256) * 2


def test_expected_bytes_of_the_ring_are_those_that_travel(ranks):
    bounds, order, mask = (0, 17, 47), "zigzag", IntervalMask(window=9)
    answers = ranks.run(ring_bytes, bounds, order, mask, size=4)
    model = Layout(bounds, order, 4)
    # The tests' tensors are float64 and hold 2 sequences.
    found = by_name(estimates(model, AttentionShape(*HEADS, 6, 4, 8, mask)))
    assert 2 * found["ring"].received == max(answers)


def ring_bytes(bounds, order, mask):
    here = Layout.on(Mesh.build("cpu", cp=4), bounds, order)
    return attend(*draw(bounds[-1]), here, "ring", mask)[5].get("exchange", 0)


def test_a_window_makes_the_ring_the_cheapest_and_few_heads_with_a_fast_link_ulysses():
    assert estimates(layout(), shape(window=64))[0].schedule == "ring"
    slow = by_name(estimates(layout(bandwidth=1e6), shape()))
    assert slow["ulysses"].seconds < slow["all-gather"].seconds


def test_arithmetic_counts_the_rank_that_has_most():
    contiguous, zigzag = (
        by_name(estimates(layout(order=order), shape()))["ring"] for order in ("contiguous", "zigzag")
    )
    pairs = 4096 * 4097 // 2 / 4
    assert zigzag.compute == pytest.approx(7 * pairs * 256 * 8 / 1e12)
    assert contiguous.compute == pytest.approx(7 * (3072 * 1024 + 1024 * 1025 // 2) * 256 * 8 / 1e12)


def test_latency_is_paid_for_every_hop():
    quick, slow = (by_name(estimates(layout(latency=latency), shape())) for latency in (0.0, 1.0))
    calls = {name: slow[name].exposed - quick[name].exposed for name in quick}
    assert calls == pytest.approx({"ring": 9, "all-gather": 3 * 4 * 3, "ulysses": 4})


def test_only_what_heads_and_ranks_allow_is_a_choice():
    assert set(by_name(estimates(layout(), shape(heads=6, kv_heads=2)))) == {"all-gather", "ring"}
    grid = Grid(2, None, None)
    assert len(estimates(layout(grid=grid), shape())) == 5
    assert set(by_name(estimates(layout(grid=grid), shape(heads=6, kv_heads=2)))) == {
        "all-gather", "ring", "ulysses-ring", "ulysses-all-gather"
    }  # fmt: skip


def test_the_reason_names_every_schedule_with_its_costs():
    found = estimates(layout(), shape())
    choice = ScheduleChoice.of(found)
    assert choice.brief == f"{found[0].schedule}, {1e3 * found[0].seconds:.3g} ms estimated"
    assert choice.details.startswith(f"{found[0].schedule} ")
    assert all(f"{each.schedule} {1e3 * each.seconds:.3g} ms" in choice.details for each in found)


def measured():
    speeds = measure_speeds(Mesh.build("cpu", cp=4).cp.group, torch.device("cpu"), 1e9 + torch.distributed.get_rank())
    return speeds


def test_measured_speeds_are_the_same_on_every_rank_and_those_of_the_slowest(ranks):
    speeds = ranks.run(measured, size=4)
    assert speeds == [speeds[0]] * 4
    assert speeds[0].flops == 1e9
    assert speeds[0].bandwidth > 0
    assert speeds[0].latency > 0


def chosen(bounds):
    here = Layout.on(Mesh.build("cpu", cp=4), bounds, "zigzag")
    auto = attend(*draw(bounds[-1]), here, "auto", CAUSAL_MASK)
    names = [
        each.schedule for each in here.cached(("choice", AttentionShape(*HEADS, 6, 4, 8, CAUSAL_MASK)), lambda: [])
    ]
    named = attend(*draw(bounds[-1]), here, names[0], CAUSAL_MASK)
    return all(torch.equal(a, b) for a, b in zip(auto[:4], named[:4], strict=True)), auto[4] == named[4]


def test_auto_runs_what_was_chosen(ranks):
    assert ranks.run(chosen, (0, 17, 47), size=4) == [(True, True)] * 4

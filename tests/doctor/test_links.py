"""Links: what the collectives measure, over groups inside nodes and between them."""

from typing import get_args

import pytest
import torch
import torch.distributed as dist

from longctx.doctor import links
from longctx.doctor.links import collective, describe_links, measure_links, received
from longctx.doctor.ranks import Places
from longctx.hardware_profile import Collective, CollectiveTimes, Sample
from longctx.parallel.local_ranks import LocalRanks
from longctx.parallel.traffic import count_traffic

CPU = torch.device("cpu")
NAMES = get_args(Collective)
SIZES = (4096, 65536)


def measure(nodes: tuple[tuple[int, ...], ...]) -> list[CollectiveTimes]:
    return measure_links(Places(nodes), CPU, 30, SIZES)


def test_two_nodes_of_two_ranks_have_three_scopes(ranks: LocalRanks) -> None:
    first, *others = ranks.run(measure, ((0, 1), (2, 3)), size=4)
    assert all(other == first for other in others), "all ranks report the slowest"
    assert [(one.scope, one.collective, one.ranks) for one in first] == [
        (scope, name, count) for scope, count in (("node", 2), ("between", 2), ("all", 4)) for name in NAMES
    ]
    for one in first:
        assert [sample.bytes for sample in one.samples] == [4096, 65536]
        assert one.latency == one.samples[0].seconds
        assert one.bandwidth == received(one.collective, 65536, one.ranks) / one.samples[1].seconds


def test_a_rank_without_a_group_waits_for_the_others(ranks: LocalRanks) -> None:
    results = ranks.run(measure, ((0, 1), (2,)), size=3)
    assert results[0] == results[1] == results[2]
    assert {(one.scope, one.ranks) for one in results[0]} == {("node", 2), ("between", 2), ("all", 3)}
    assert {sample.bytes for one in results[0] if one.ranks == 3 for sample in one.samples} == {4092, 65532}


def bytes_received(size: int) -> dict[str, int]:
    group = dist.group.WORLD
    assert group is not None
    found = {}
    for name in NAMES:
        with count_traffic() as traffic:
            collective(name, size, group, CPU)()
        found[name] = traffic.received
    return found


def test_what_is_said_to_be_received_is_what_is_sent(ranks: LocalRanks) -> None:
    """The sizes of the timed calls are those that the bandwidth counts."""
    for found in ranks.run(bytes_received, 300, size=3):
        assert found == {name: received(name, 1200, 3) for name in NAMES}


def test_results_too_large_for_memory_and_slow_sizes_are_left_out(ranks: LocalRanks) -> None:
    for times in ranks.run(measure_bounded, size=2)[0]:
        kept = 1 if times.collective == "all_gather" else 2
        assert len(times.samples) == kept, times.collective
    for times in ranks.run(measure_slow, size=2)[0]:
        assert len(times.samples) == 1


def measure_bounded() -> list[CollectiveTimes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(links.LARGEST_RESULT, "cpu", 8192)
        return measure(((0, 1),))


def measure_slow() -> list[CollectiveTimes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "LONGEST", 0.0)
        return measure(((0, 1),))


def test_one_rank_has_no_links() -> None:
    assert measure_links(Places(((0,),)), CPU, 30) == []


def test_lines_give_bandwidth_and_latency() -> None:
    times = CollectiveTimes(
        collective="all_gather",
        scope="between",
        backend="nccl",
        ranks=4,
        samples=(Sample(bytes=4096, seconds=2e-5), Sample(bytes=2**20, seconds=1e-3)),
        latency=2e-5,
        bandwidth=2.5e10,
    )
    (found,) = describe_links([times])
    assert (found.name, found.status) == ("all_gather, between nodes", "ok")
    assert found.value == "25 GB/s received per rank at 1 MiB, 20 us at 4 KiB (4 ranks, nccl)"

"""Link of each node: pairs of nodes, and a node that is slow with both of its neighbours."""

import time

import pytest
import torch
import torch.distributed as dist

from longctx.doctor import node_links
from longctx.doctor.node_links import check_node_links, measure_node_links, neighbour
from longctx.parallel.local_ranks import LocalRanks

CPU = torch.device("cpu")
SLOW = 2


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_every_node_is_paired_with_a_neighbour(count: int) -> None:
    others = [[neighbour(own, first, count) for own in range(count)] for first in (0, 1)]
    for each in others:
        pairs = [(own, other) for own, other in enumerate(each) if other is not None]
        assert all(each[other] == own and (own - other) % count in (1, count - 1) for own, other in pairs)
        assert len(pairs) == count - count % 2
    assert all(first != second for first, second in zip(*others, strict=True)), "the other one in the other round"


def measure(leaders: tuple[int, ...], delay: float = 0.0) -> list[float]:
    def late(*arguments: object) -> object:
        if dist.get_rank() == SLOW:
            time.sleep(delay)
        return exchange(*arguments)

    exchange = node_links.exchange
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_links, "exchange", late)
        return measure_node_links(leaders, CPU, 30, 65536)


def test_a_node_that_is_slow_with_both_neighbours_is_found(ranks: LocalRanks) -> None:
    first, *others = ranks.run(measure, (0, 1, 2, 3), 0.05, size=4)
    assert all(other == first for other in others)
    assert first[SLOW] <= 65536 / 0.05
    assert max(first[1], first[3]) > 2 * first[SLOW], "its neighbours are measured with their other ones"


def test_fewer_than_three_nodes_are_not_compared(ranks: LocalRanks) -> None:
    assert ranks.run(measure, (0, 1), size=2) == [[], []]
    assert check_node_links([], []) == []


def test_ranks_that_lead_no_node_wait(ranks: LocalRanks) -> None:
    first, *others = ranks.run(measure, (0, 2, 3), size=4)
    assert len(first) == 3
    assert min(first) > 0
    assert all(other == first for other in others)


@pytest.mark.parametrize(("slow", "status"), [(8e9, "ok"), (7e9, "warning"), (4e9, "wrong")])
def test_a_slow_node_is_named(slow: float, status: str) -> None:
    (found,) = check_node_links([1e10, 1e10, slow, 1.1e10], ["a", "b", "c", "d"])
    assert found.status == status
    assert found.value.startswith("10 GB/s per direction (median)")
    assert ("; c " in found.value) == (status != "ok")

"""Ranks and their nodes: places, groups of each scope, and values of all ranks."""

import torch
import torch.distributed as dist

from longctx.doctor.ranks import Places, gather, make_groups
from longctx.parallel.collectives import all_gather
from longctx.parallel.local_ranks import LocalRanks

TWO_NODES = Places(((0, 1), (2, 3)))


def test_ranks_of_one_machine_are_a_node() -> None:
    places = Places.of(["b", "a", "b", "a"])
    assert places == Places(((0, 2), (1, 3)))
    assert (places.size, places.leaders, places.most_per_node) == (4, (0, 1), 2)
    assert [places.node_of(rank) for rank in range(4)] == [0, 1, 0, 1]


def test_a_counterpart_is_on_the_next_node() -> None:
    assert [TWO_NODES.counterpart(rank) for rank in range(4)] == [2, 3, 0, 1]
    assert [Places(((0, 1, 2), (3,))).counterpart(rank) for rank in range(4)] == [3, 3, 3, 0]
    assert [Places(((0, 1),)).counterpart(rank) for rank in range(2)] == [0, 1]


def test_scopes_without_another_rank_are_left_out() -> None:
    assert TWO_NODES.groups() == {"node": [(0, 1), (2, 3)], "between": [(0, 2), (1, 3)], "all": [(0, 1, 2, 3)]}
    assert Places(((0, 1, 2),)).groups() == {"node": [(0, 1, 2)]}
    assert Places(((0,), (1,))).groups() == {"between": [(0, 1)]}
    assert Places(((0, 1), (2,))).groups() == {"node": [(0, 1)], "between": [(0, 2)], "all": [(0, 1, 2)]}
    assert Places(((0,),)).groups() == {}


def values_and_sums() -> tuple[list[str], list[float] | None]:
    rank = dist.get_rank()
    group = make_groups([(0, 2)], 30)
    gathered = gather(f"rank {rank}")
    return gathered, None if group is None else all_gather(torch.tensor(float(rank)), group).wait().tolist()


def test_every_rank_gets_the_values_of_all_and_its_own_group(ranks: LocalRanks) -> None:
    names = ["rank 0", "rank 1", "rank 2"]
    assert ranks.run(values_and_sums, size=3) == [(names, [0.0, 2.0]), (names, None), (names, [0.0, 2.0])]

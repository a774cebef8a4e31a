"""The mesh: which ranks belong together, built here or from groups of others, and sizes that cannot be."""

import pytest
import torch.distributed as dist

from longctx.parallel.mesh import Mesh


def members(axis):
    return [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)


def axes_of(sizes):
    mesh = Mesh.build("cpu", **sizes)
    found = {name: getattr(mesh, name) for name in ("dp", "cp", "tp", "ep", "ulysses", "ring")}
    for axis in found.values():
        assert axis.size == len(members(axis))
        assert members(axis)[axis.rank] == dist.get_rank()
    return {name: members(axis) for name, axis in found.items()} | {"shard": tuple(mesh.shard.shape)}


def test_cp_is_innermost_but_for_tp(ranks):
    got = ranks.run(axes_of, {"dp_shard": 2, "cp": 2}, size=4)
    assert [each["cp"] for each in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["dp"] for each in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(each["shard"] == (4,) and each["tp"] == [rank] for rank, each in enumerate(got))
    got = ranks.run(axes_of, {"cp": 2, "tp": 2}, size=4)
    assert [each["tp"] for each in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["cp"] for each in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(each["shard"] == (2,) for each in got)
    assert all(each["shard"] == (2, 2) for each in ranks.run(axes_of, {"dp_replicate": 2, "cp": 2}, size=4))


def test_cp_divides_into_ulysses_groups_of_neighbours_and_rings(ranks):
    got = ranks.run(axes_of, {"cp": 4, "ulysses": 2}, size=4)
    assert [each["ulysses"] for each in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["ring"] for each in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(each["cp"] == [0, 1, 2, 3] for each in got)
    got = ranks.run(axes_of, {"cp": 4}, size=4)
    assert all(each["ring"] == each["cp"] and each["ulysses"] == [rank] for rank, each in enumerate(got))


def test_experts_are_divided_among_neighbours_that_shard_parameters(ranks):
    got = ranks.run(axes_of, {"dp_shard": 2, "cp": 2, "ep": 2}, size=4)
    assert [each["ep"] for each in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each["ep"] for each in ranks.run(axes_of, {"cp": 4, "ep": 4}, size=4)] == [[0, 1, 2, 3]] * 4


def refusal(sizes):
    with pytest.raises(ValueError, match="mesh: ") as caught:
        Mesh.build("cpu", **sizes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp_shard": 3}, "dp_replicate 1 x dp_shard 3 x cp 1 x tp 1 = 3, but there are 2 ranks"),
        ({"cp": 2, "ulysses": 3}, "cp 2 is not ulysses 3 x ring: 2 / 3 leaves 2"),
        ({"cp": 2, "ep": 4}, "ep 4 does not divide dp_shard 1 x cp 2 = 2: 2 ranks would be left"),
        ({"cp": 0}, "cp is 0: expected at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_the_arithmetic(ranks, sizes, message):
    assert all(message in each for each in ranks.run(refusal, sizes, size=2))


def of_groups(ulysses, ring):
    """A mesh of groups made by hand, as lists of ranks of cp, which has all."""
    groups = {}
    for name, parts in (("ulysses", ulysses), ("ring", ring)):
        for part in parts:
            group = dist.new_group(part)
            if dist.get_rank() in part:
                groups[name] = group
    dist.barrier()  # a rank that is done would close connections that others still make
    try:
        mesh = Mesh.from_groups("cpu", cp=dist.group.WORLD, **groups)
    except ValueError as error:
        return str(error)
    assert mesh.shard is None
    return mesh.grid.ulysses, members(mesh.ulysses), members(mesh.ring), mesh.cp.rank, mesh.dp.size


def test_groups_of_another_framework_make_a_mesh(ranks):
    got = ranks.run(of_groups, [[0, 1], [2, 3]], [[0, 2], [1, 3]], size=4)
    assert [each[0::3] for each in got] == [(2, rank) for rank in range(4)]
    assert [each[1] for each in got] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [each[2] for each in got] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [each[4] for each in got] == [1] * 4


@pytest.mark.parametrize(
    ("ulysses", "ring", "message"),
    [
        ([[0, 2], [1, 3]], [[0, 1], [2, 3]], "the ulysses group of rank 0 has the ranks [0, 2]: expected [0, 1]"),
        ([[0, 1], [2, 3]], [[0, 3], [1, 2]], "the ring group of rank 0 has the ranks [0, 3]: expected [0, 2]"),
        ([[0, 1], [2, 3]], [], "ulysses 2 x ring 1 = 2, but cp has 4 ranks"),
    ],
)
def test_groups_that_do_not_divide_cp_are_refused(ranks, ulysses, ring, message):
    assert message in ranks.run(of_groups, ulysses, ring, size=4)[0]

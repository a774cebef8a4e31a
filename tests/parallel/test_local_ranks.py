"""Ranks on this machine: answers in order, failures told and survived."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from longctx.parallel.local_ranks import LocalRankError, LocalRanks
from longctx.parallel.mesh import Mesh
from longctx.parallel.rank_errors import RankError, raise_on_all_ranks


def rank_and_sum(x):
    total = torch.tensor([float(dist.get_rank() + x)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def fail_on(rank, how):
    if dist.get_rank() == rank:
        if how == "raise":
            raise ZeroDivisionError("on purpose")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def agreed(kind):
    with raise_on_all_ranks():
        if dist.get_rank() == 1 and kind is not None:
            raise kind("rank 1 has no data")
    return "went on"


def test_results_come_in_the_order_of_ranks(ranks):
    assert ranks.run(rank_and_sum, 1, size=4) == [(r, 10.0) for r in range(4)]
    assert ranks.run(rank_and_sum, 0, size=2) == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize(("how", "word"), [("raise", "on purpose"), ("kill", "the process died")])
def test_a_rank_that_fails_is_named_and_does_not_hang_the_others(how, word):
    with LocalRanks(2, timeout=20, settle=2) as pool:
        began = time.monotonic()
        with pytest.raises(LocalRankError, match=f"(?s)rank 1: .*{word}"):
            pool.run(fail_on, 1, how)
        assert time.monotonic() - began < 20
        assert pool.run(rank_and_sum, 0) == [(0, 1.0), (1, 1.0)]


def test_more_ranks_than_there_are_is_refused(ranks):
    with pytest.raises(ValueError, match="size is 5: expected 1 to 4"):
        ranks.run(rank_and_sum, 0, size=5)


def test_a_block_without_an_error_continues_on_every_rank(ranks):
    assert ranks.run(agreed, None, size=2) == ["went on"] * 2


@pytest.mark.parametrize(("kind", "elsewhere"), [(ValueError, ValueError), (KeyError, RankError)])
def test_an_error_on_one_rank_is_raised_on_every_rank(kind, elsewhere):
    with LocalRanks(2, timeout=20, settle=2) as pool, pytest.raises(LocalRankError) as caught:
        pool.run(agreed, kind)
    told = str(caught.value).split("rank 1: Traceback")
    assert f"{elsewhere.__name__}: " in told[0]
    assert "rank 1 has no data" in told[0]
    assert f"{kind.__name__}: " in told[1]


def sum_over_shards(extra_groups):
    """The whole of a sharded sum, on a mesh whose groups' names depend on how many were made before it."""
    for _ in range(extra_groups):
        dist.new_group([0])
    mesh = Mesh.build("cpu", dp_replicate=2, cp=2).shard
    shards = distribute_tensor(torch.arange(8.0), mesh, [Replicate(), Shard(0)])
    return (shards + shards).full_tensor().tolist()


def test_meshes_of_an_earlier_call_are_forgotten(ranks):
    want = [2.0 * x for x in range(8)]
    for extra in (5, 0, 3):
        assert ranks.run(sum_over_shards, extra, size=4) == [want] * 4

"""Tensor-parallel shares: shards of fused projections, and the tensor that they join to."""

import pytest
import torch
from torch import nn

from longctx.mixers.shares import Share, row_shares


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dim", "parts"), [(0, (12,)), (0, (24, 12, 12)), (1, (12, 36)), (2, (12, 24, 12)), (-1, (24, 12))], ids=str
)
def test_shards_of_all_ranks_join_to_the_tensor(dim, parts, size):
    shape = [3, 5, 7]
    shape[dim] = sum(parts)
    tensor, share = numbered(*shape), Share(dim, parts)
    shards = [share.shard(tensor, rank, size) for rank in range(size)]
    assert {shard.shape[dim] for shard in shards} == {sum(parts) // size}
    assert torch.equal(share.join(shards), tensor)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_joined_shards_are_sharded_to_the_same_shards(size):
    share = Share(0, (12, 24))
    shards = [numbered(36 // size, 2) + 1000 * rank for rank in range(size)]
    joined = share.join(shards)
    assert all(torch.equal(share.shard(joined, rank, size), shards[rank]) for rank in range(size))


def test_a_rank_has_the_same_heads_of_every_part():
    # Two query heads of width 2 per key head of width 2; rows are named by part and head.
    rows = ["q0", "q0", "q1", "q1", "q2", "q2", "q3", "q3", "k0", "k0", "k1", "k1", "v0", "v1"]
    share = Share(0, (8, 4, 2))
    shards = [share.shard(torch.arange(len(rows)), rank, 2).tolist() for rank in range(2)]
    assert [rows[row] for row in shards[0]] == ["q0", "q0", "q1", "q1", "k0", "k0", "v0"]
    assert [rows[row] for row in shards[1]] == ["q2", "q2", "q3", "q3", "k1", "k1", "v1"]


def test_parts_that_do_not_make_up_the_tensor_are_refused():
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        Share(0, (4, 4)).shard(numbered(10), 0, 2)


def test_row_shares_are_of_the_parameters_and_buffers_that_exist():
    module = nn.Module()
    module.gate = nn.Linear(4, 6, bias=False)
    module.register_buffer("log_decay", torch.zeros(3), persistent=False)
    shares = row_shares(module, "gate.weight", "gate.bias", "log_decay", "missing")
    assert shares == {"gate.weight": Share(0, (6,)), "log_decay": Share(0, (3,))}

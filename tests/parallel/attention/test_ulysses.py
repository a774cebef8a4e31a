"""Ulysses: which heads a rank computes, and the all-to-all that brings them and returns their output."""

import pytest
import torch
import torch.distributed as dist

from longctx.parallel.attention.ulysses import HeadPartition, check_heads, gather_heads, scatter_heads, scatter_rows_of
from longctx.parallel.traffic import count_traffic

PARTITIONS = [(8, 8, 4), (8, 2, 4), (8, 1, 2), (12, 3, 4), (12, 2, 4), (24, 6, 4), (6, 3, 3), (4, 2, 1)]
"""Query heads, key/value heads and ranks: as many of these as ranks, fewer, and groups that end inside a rank."""
each_partition = pytest.mark.parametrize("sizes", PARTITIONS)


@each_partition
def test_query_heads_are_divided_and_each_reads_the_head_of_its_group(sizes):
    heads = HeadPartition(*sizes)
    queries = [head for rank in range(heads.size) for head in range(heads.queries)[heads.of_queries(rank)]]
    assert queries == list(range(heads.queries))
    group = heads.queries // heads.keys
    for rank in range(heads.size):
        own, keys = range(heads.queries)[heads.of_queries(rank)], range(heads.keys)[heads.of_keys(rank)]
        assert list(keys) == sorted({head // group for head in own})
        assert [keys[n] for n in heads.keys_read(rank)] == [head // group for head in own]


@each_partition
def test_repeated_key_value_heads_give_groups_of_one_size(sizes):
    heads = HeadPartition(*sizes)
    for rank in range(heads.size):
        read, index = heads.keys_read(rank), heads.expanded(rank)
        index = list(range(read[-1] + 1)) if index is None else index
        assert len(read) % len(index) == 0
        assert [index[n // (len(read) // len(index))] for n in range(len(read))] == read


def test_the_rank_with_most_key_value_heads_counts():
    assert HeadPartition(8, 2, 4).most_keys == 1
    assert HeadPartition(12, 3, 4).most_keys == 2
    # Ranks 0 and 3 read one head each, ranks 1 and 2 two.
    assert [HeadPartition(12, 3, 4).expanded(rank) for rank in range(4)] == [None, [0, 1, 1], [0, 0, 1], None]


def test_heads_that_do_not_divide_are_refused_with_an_alternative():
    with pytest.raises(ValueError, match=r"6 query heads do not divide over 4 ranks \(6 = 1 x 4 \+ 2\).*groups of 2"):
        HeadPartition(6, 2, 4)
    with pytest.raises(ValueError, match=r"5 query heads do not divide over 4 ranks.*'ring' or 'all-gather'"):
        check_heads(5, 4)
    check_heads(8, 4)


BATCH, TOKENS, KEY_DIM, VALUE_DIM = 2, 3, 4, 5


def draw(heads, seed=0):
    """q, k, v and something of the output's shape, of the rows of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads.queries, KEY_DIM), (heads.keys, KEY_DIM), (heads.keys, VALUE_DIM), (heads.queries, VALUE_DIM)]
    rows = heads.size * TOKENS
    return [torch.randn(BATCH, rows, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def own_rows(x, rank):
    return x[:, rank * TOKENS : (rank + 1) * TOKENS].clone()


def exchange_heads(all_sizes):
    answers = []
    for sizes in all_sizes:
        heads, group, rank = HeadPartition(*sizes), dist.group.WORLD, dist.get_rank()
        leaves = [own_rows(x, rank).requires_grad_() for x in draw(heads)[:3]]
        with count_traffic() as forward:
            parts = scatter_heads(*leaves, heads, group)
        weights = [x[:, :, : y.shape[2]] for x, y in zip(draw(heads, 1 + rank), parts, strict=False)]
        with count_traffic() as backward:
            torch.autograd.backward(parts, weights)
        back = gather_heads(parts[0].detach(), heads, group)
        products = [
            (float((y.detach() * w).sum()), float((x.detach() * x.grad).sum()))
            for x, y, w in zip(leaves, parts, weights, strict=True)
        ]
        traffic = dict(forward.calls), forward.received, dict(backward.calls)
        answers.append(([x.detach() for x in parts], back, products, traffic))
    return answers


OVER_4 = [sizes for sizes in PARTITIONS if sizes[2] == 4]


def test_each_rank_gets_its_heads_of_all_rows_and_the_adjoint_returns_their_gradients(ranks):
    answers = ranks.run(exchange_heads, OVER_4, size=4)
    for sizes, *by_rank in zip(OVER_4, *answers, strict=True):
        heads = HeadPartition(*sizes)
        q, k, v, _ = draw(heads)
        group = heads.queries // heads.keys
        for rank, (parts, back, _, traffic) in enumerate(by_rank):
            own = range(heads.queries)[heads.of_queries(rank)]
            assert torch.equal(parts[0], q[:, :, list(own)])
            for part, x in zip(parts[1:], (k, v), strict=True):
                read = part.repeat_interleave(len(own) // part.shape[2], dim=2)
                assert torch.equal(read, x[:, :, [head // group for head in own]])
            assert torch.equal(back, own_rows(q, rank))
            keys = heads.of_keys(rank).stop - heads.of_keys(rank).start
            elements = len(own) * KEY_DIM + keys * (KEY_DIM + VALUE_DIM)
            assert traffic == ({"all_to_all": 1}, 3 * BATCH * TOKENS * elements * 8, {"all_to_all": 1})
        # <scatter(x), w> = <x, scatter's transpose(w)>, summed over ranks, for q, k and v.
        for products in zip(*(products for _, _, products, _ in by_rank), strict=True):
            forward, backward = map(sum, zip(*products, strict=True))
            assert forward == pytest.approx(backward, rel=1e-12, abs=1e-12)


def return_heads(sizes):
    heads, group, rank = HeadPartition(*sizes), dist.group.WORLD, dist.get_rank()
    out, weights = draw(heads)[3], draw(heads, 1)[3]
    x = out[:, :, heads.of_queries(rank)].clone().requires_grad_()
    with count_traffic() as traffic:
        y = gather_heads(x, heads, group)
        y.backward(own_rows(weights, rank))
    again = scatter_rows_of(y.detach(), heads.size, group)
    return y.detach(), x.grad, again, dict(traffic.calls)


def test_all_heads_of_own_rows_return_and_their_gradients_go_to_the_ranks_of_the_heads(ranks):
    heads = HeadPartition(6, 3, 3)
    out, weights = draw(heads)[3], draw(heads, 1)[3]
    for rank, (y, grad, again, calls) in enumerate(ranks.run(return_heads, (6, 3, 3), size=3)):
        assert torch.equal(y, own_rows(out, rank))
        assert torch.equal(grad, weights[:, :, heads.of_queries(rank)])
        assert torch.equal(again, out[:, :, heads.of_queries(rank)])
        assert calls == {"all_to_all": 2}

"""All-gather attention: slices of key/value heads, the order of tokens, and bytes."""

import pytest
import torch

from longctx.kernels.attention import reference
from longctx.kernels.attention.masks import CAUSAL_MASK, IntervalMask
from longctx.parallel.attention.all_gather import HEAD_SLICES, AllGatherSchedule
from longctx.parallel.attention.visibility import KVOwners
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import count_traffic
from tests.parallel.cases import ORDERS, layout_here

CPU = torch.device("cpu")
BATCH, KEY_DIM, VALUE_DIM = 2, 3, 5
SCALE = 0.3


def schedule_on(layout, mask=CAUSAL_MASK):
    return AllGatherSchedule.of(KVOwners.of(layout, 1, mask), layout.rank, layout.comm_group, CPU)


def draw(length, heads, kv_heads):
    generator = torch.Generator().manual_seed(length + kv_heads)
    shapes = [(heads, KEY_DIM), (kv_heads, KEY_DIM), (kv_heads, VALUE_DIM), (heads, VALUE_DIM)]
    return [torch.randn(BATCH, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend(cases):
    answers = []
    for bounds, order, heads, kv_heads in cases:
        layout = layout_here(bounds, order)
        schedule = schedule_on(layout)
        q, k, v, do = map(layout.shard, draw(bounds[-1], heads, kv_heads))
        with count_traffic() as forward:
            out, lse = schedule.forward(q, k, v, SCALE)
        with count_traffic() as backward:
            grads = schedule.backward(do, q, k, v, out, lse, SCALE)
        counts = [(dict(traffic.calls), dict(traffic.bytes)) for traffic in (forward, backward)]
        answers.append(((out, lse.transpose(1, 2), *grads), counts))
    return answers


CASES = [
    ((0, 5, 6, 21, 43), "zigzag", 4, 2),
    ((0, 32), "contiguous", 8, 8),
    ((0, 7, 33), "balanced", 5, 5),
    ((0, 1, 3), "zigzag", 2, 1),
]


@pytest.mark.parametrize("size", [1, 4])
def test_output_lse_and_gradients_equal_the_whole_score_matrix(ranks, size):
    for case, *parts in zip(CASES, *ranks.run(attend, CASES, size=size), strict=True):
        bounds, order, heads, kv_heads = case
        q, k, v, do = draw(bounds[-1], heads, kv_heads)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        places = torch.arange(bounds[-1])
        documents = torch.bucketize(places, torch.tensor(bounds[1:]), right=True)
        seen = (documents[:, None] == documents) & (places[:, None] >= places)
        out, lse = reference.softmax_attention(*leaves, seen, SCALE)
        out.backward(do)
        refs = out.detach(), lse.detach().transpose(1, 2), *(x.grad for x in leaves)
        layout = Layout(bounds, order, size)
        for shards, want in zip(zip(*(tensors for tensors, _ in parts), strict=True), refs, strict=True):
            torch.testing.assert_close(layout.unshard(shards), want, rtol=1e-10, atol=1e-10)


def count_calls(all_heads):
    answers = []
    for kv_heads in all_heads:
        [(_, counts)] = attend([((0, 24), "zigzag", kv_heads, kv_heads)])
        answers.append(counts)
    return answers


def test_key_value_heads_travel_in_at_most_four_slices_whatever_their_number(ranks):
    slices = {1: 1, 2: 2, 4: 4, 5: 3, 8: 4, 9: 3}
    assert max(slices.values()) == HEAD_SLICES == 4
    for answers in ranks.run(count_calls, list(slices), size=3):
        for (kv_heads, calls), (forward, backward) in zip(slices.items(), answers, strict=True):
            # 2 other ranks with 8 tokens each; the gradients are of as many elements as keys and values.
            received = 2 * 8 * BATCH * kv_heads * (KEY_DIM + VALUE_DIM) * 8
            assert forward == ({"all_gather": calls}, {"all_gather": received})
            assert backward == (
                {"all_gather": calls, "reduce_scatter": calls},
                {"all_gather": received, "reduce_scatter": received},
            )


def test_one_owner_communicates_nothing(ranks):
    assert ranks.run(count_calls, [5], size=1) == [[[({}, {}), ({}, {})]]]


def mean_of_places(cases):
    """Outputs and lse of queries that are zero, so that all visible keys weigh the same; values are their places."""
    answers = []
    for length, order, window in cases:
        layout = layout_here((0, length), order)
        places = torch.arange(length, dtype=torch.float64)[None, :, None, None]
        v = layout.shard(places.expand(1, -1, 2, 1).contiguous())
        q = torch.zeros(1, layout.local_length, 2, 1, dtype=torch.float64)
        out, lse = schedule_on(layout, IntervalMask(window=window)).forward(q, torch.ones_like(q), v, 1.0)
        answers.append((out, lse.transpose(1, 2)))
    return answers


def test_gathered_keys_are_in_the_order_of_the_sequence(ranks):
    cases = [(length, order, window) for length in (23, 3) for order in ORDERS for window in (1, 7)]
    for case, *parts in zip(cases, *ranks.run(mean_of_places, cases, size=4), strict=True):
        length, order, window = case
        layout = Layout((0, length), order, 4)
        out, lse = (layout.unshard(shards)[0, :, 1].squeeze(-1) for shards in zip(*parts, strict=True))
        seen = [range(max(0, t - window + 1), t + 1) for t in range(length)]
        want = torch.tensor([[sum(keys) / len(keys), len(keys)] for keys in seen], dtype=torch.float64)
        torch.testing.assert_close(out, want[:, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse.exp(), want[:, 1], rtol=1e-12, atol=1e-12)

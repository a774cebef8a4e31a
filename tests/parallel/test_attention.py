"""All-gather attention over ranks against the dense reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.kernels import reference
from longctx.parallel import attention
from longctx.parallel.attention import all_gather_attention, causal_blocks, score_elements
from longctx.parallel.collectives import counted
from longctx.parallel.layout import Layout
from tests.parallel.cases import PACKINGS, layout_here


def draw(length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, do = (torch.randn(2, length, 4, 8, generator=generator, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, length, 2, 8, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, v, do


def on_rank(cases, dtype):
    answers = []
    for bounds, order in cases:
        layout = layout_here(bounds, order)
        q, k, v, do = draw(bounds[-1], dtype)
        leaves = [layout.shard(x).requires_grad_() for x in (q, k, v)]
        with counted() as traffic:
            out = all_gather_attention(*leaves, layout, 0.3)
            out.backward(layout.shard(do))
        answers.append((out.detach(), *(x.grad for x in leaves), dict(traffic.calls), dict(traffic.bytes)))
    return answers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_layout_equals_one_rank(ranks, size, dtype, bound):
    cases = list(itertools.product(PACKINGS.values(), ["contiguous", "zigzag"]))
    answers = ranks.run(on_rank, cases, dtype, size=size)
    for number, (bounds, order) in enumerate(cases):
        *leaves, do = draw(bounds[-1], dtype)
        leaves = [x.requires_grad_() for x in leaves]
        want, _ = reference.softmax_attention(*leaves, reference.causal_document_mask(bounds), 0.3)
        want.backward(do)
        layout = Layout(bounds, order, size)
        parts = list(zip(*(answer[number] for answer in answers), strict=True))
        for name, part, ref in zip(("o", "dq", "dk", "dv"), parts, (want, *(x.grad for x in leaves)), strict=False):
            # The gradient to q and k is 0 where every token is a document.
            assert (layout.unshard(part) - ref).norm() <= bound * max(ref.norm(), 1), f"{name} {bounds} {order}"
        if size > 1:
            assert parts[4] == tuple([{"all_gather": 2, "reduce_scatter": 1}] * size)
            kv = 2 * 2 * (bounds[-1] // size) * 2 * 8 * (size - 1) * torch.finfo(dtype).bits // 8
            assert parts[5] == tuple([{"all_gather": 2 * kv, "reduce_scatter": kv}] * size)


def outputs_around(order, t):
    layout = layout_here((0, 17, 48), order)
    q, k, v, _ = draw(48, torch.float32)
    before = all_gather_attention(*map(layout.shard, (q, k, v)), layout, 0.3)
    for x in (q, k, v):
        x[:, t] = torch.randn_like(x[:, t])
    return before, all_gather_attention(*map(layout.shard, (q, k, v)), layout, 0.3)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("t", [0, 16, 30, 47])
def test_changing_a_token_leaves_earlier_outputs_on_all_ranks_bitwise_unchanged(ranks, order, t):
    layout = Layout((0, 17, 48), order, 4)
    before, after = (layout.unshard(parts) for parts in zip(*ranks.run(outputs_around, order, t, size=4), strict=True))
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@settings(max_examples=60)
@given(
    inner=st.sets(st.integers(1, 95)),
    order=st.sampled_from(["contiguous", "zigzag"]),
    size=st.sampled_from([1, 2, 3, 4]),
    tile=st.sampled_from([1, 8, 256]),
)
def test_blocks_cover_exactly_what_the_mask_shows(inner, order, size, tile):
    bounds = (0, *sorted(inner), 96)
    want = reference.causal_document_mask(bounds)
    seen = torch.zeros(96, 96, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "DOCUMENT_TILE", tile)
        for rank in range(size):
            layout = Layout(bounds, order, size, rank)
            tokens = layout.shard(torch.arange(96), dim=0)
            attention._plan.cache_clear()
            for block in causal_blocks(layout):
                queries, keys = tokens[block.q_begin : block.q_end], torch.arange(block.k_begin, block.k_end)
                mask = block.mask(torch.device("cpu"))
                if not isinstance(mask, torch.Tensor):
                    shape = (len(queries), len(keys))
                    mask = torch.ones(shape, dtype=torch.bool) if not block.causal else torch.ones(shape).tril().bool()
                assert mask.any()
                seen[queries[:, None], keys[None, :]] += mask
    attention._plan.cache_clear()
    assert torch.equal(seen, want.long())
    assert sum(score_elements(Layout(bounds, order, size, rank)) for rank in range(size)) == want.sum()


def test_zigzag_balances_the_causal_work_of_one_document():
    def spread(order):
        work = [score_elements(Layout((0, 4096), order, 4, rank)) for rank in range(4)]
        return max(work) / (sum(work) / 4)

    assert spread("zigzag") == 1.0
    assert spread("contiguous") > 1.7


def test_wrong_arguments_are_refused():
    q, k, v, _ = draw(8)
    with pytest.raises(ValueError, match="8 tokens, but the layout gives this rank 4"):
        all_gather_attention(q, k, v, Layout((0, 4)), 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        all_gather_attention(q, k, v[..., :4], Layout((0, 8)), 1.0)
    with pytest.raises(ValueError, match="earlier keys are not here"):
        all_gather_attention(q, k, v, Layout((0, 8), continued=3), 1.0)

"""Bidirectional linear attention over ranks, against the dense sum."""

import itertools
import re
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.parallel.layout import Layout
from longctx.parallel.linear import noncausal_linear_attention
from longctx.parallel.traffic import count_traffic
from tests.combinations import mostly_slow_rows
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN, few_examples, layout_here, packings


def draw(length, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, 4, 5), (2, length, 2, 5), (2, length, 2, 3), (2, length, 4, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def same_document(bounds):
    ids = torch.searchsorted(torch.tensor(bounds), torch.arange(bounds[-1]), right=True)
    return ids[:, None] == ids[None, :]


def on_rank(cases, dtype):
    answers = []
    for bounds, order in cases:
        layout = layout_here(bounds, order)
        q, k, v, do = draw(bounds[-1], dtype)
        leaves = [layout.shard(x, fill=float("nan")).requires_grad_() for x in (q, k, v)]
        with count_traffic() as traffic:
            out = noncausal_linear_attention(*leaves, layout, scale=0.5)
            out.backward(layout.shard(do))
        answers.append((out.detach(), *(x.grad for x in leaves), dict(traffic.calls), dict(traffic.bytes)))
    return answers


def compare(answers, cases, size, dtype, bound):
    for number, (bounds, order) in enumerate(cases):
        q, k, v, do = (x.double() for x in draw(bounds[-1], dtype))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        wide = [x.repeat_interleave(2, dim=2) for x in leaves[1:]]
        scores = torch.einsum("bthk,bshk->bhts", leaves[0], wide[0]) * same_document(bounds)
        want = 0.5 * torch.einsum("bhts,bshv->bthv", scores, wide[1])
        want.backward(do)
        layout = Layout(bounds, order, size)
        parts = zip(*(answer[number] for answer in answers), strict=True)
        for name, part, ref in zip(("o", "dq", "dk", "dv"), parts, (want, *(x.grad for x in leaves)), strict=False):
            assert (layout.unshard(part) - ref).norm() <= bound * ref.norm(), f"{name} {bounds} {order}"
            for rank, each in enumerate(part):
                assert all((each[:, gap] == 0).all() for gap in layout.for_rank(rank).padding)


CASES = list(itertools.product([*PACKINGS.values(), *UNEVEN.values()], ORDERS))
MANY_DOCUMENTS = (tuple(range(0, 1201, 3)), "zigzag")


@pytest.mark.parametrize(
    ("size", "dtype", "bound"),
    mostly_slow_rows(
        [
            (n, *row)
            for n in (1, 2, 4)
            for row in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2))
        ],
        lambda size, dtype, bound: size == 4 or dtype == {1: torch.float64, 2: torch.float32}[size],
    ),
)
def test_every_layout_equals_one_rank(ranks, size, dtype, bound):
    cases = [*CASES, MANY_DOCUMENTS] if dtype == torch.float64 else CASES[:6]
    compare(ranks.run(on_rank, cases, dtype, size=size), cases, size, dtype, bound)


@few_examples
@given(cases=st.lists(st.tuples(packings(), st.sampled_from(ORDERS)), min_size=8, max_size=8))
def test_documents_begin_and_end_anywhere(ranks, cases):
    compare(ranks.run(on_rank, cases, torch.float64, size=4), cases, 4, torch.float64, 1e-12)


def test_one_all_reduce_a_pass_of_the_documents_that_ranks_share(ranks):
    cases = [((0, 48), "contiguous"), ((0, 14, 30, 48), "contiguous"), ((0, 12, 24, 36, 48), "contiguous")]
    answers = ranks.run(on_rank, cases, torch.float64, size=4)
    state = 2 * 2 * 5 * 3 * 8
    for answer in answers:
        for (*_, calls, received), shared in zip(answer, (1, 3, 0), strict=True):
            assert calls == ({"all_reduce": 2} if shared else {})
            assert received.get("all_reduce", 0) == 2 * (2 * 3 * shared * state // 4)


def test_wrong_arguments_are_refused():
    q, k, v, _ = draw(8, torch.float64)
    with pytest.raises(ValueError, match=r"k \[2, 7, 2, 5\].*expected \[B, T, Hq, K\]"):
        noncausal_linear_attention(q, k[:, :7], v, Layout((0, 8)))
    with pytest.raises(ValueError, match="q has 8 tokens: expected 4, this rank's share of the layout"):
        noncausal_linear_attention(q, k, v, Layout((0, 4)))
    with pytest.raises(ValueError, match="past_tokens=2: bidirectional attention needs whole documents"):
        noncausal_linear_attention(q, k, v, Layout((0, 8), past_tokens=2))


def test_the_example_in_the_docs_runs_as_printed():
    page = (Path(__file__).parents[3] / "docs/parallelism.md").read_text()
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, flags=re.MULTILINE)
    (example,) = [textwrap.dedent(block) for block in blocks if "noncausal_linear_attention(" in block]
    names = {}
    exec(example, names)
    layout, q, k, v, o = (names[name] for name in ("layout", "q", "k", "v", "o"))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * same_document(layout.cu_seqlens)
    want = 64**-0.5 * torch.einsum("bhts,bshv->bthv", scores, v)
    assert (o - want).norm() <= 1e-5 * want.norm()

"""Mixture of heads: what is routed equals all heads times a mask, and nothing else is computed."""

import itertools
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.attention.block import IntervalMask
from longctx.moe.head_router import by_norm, learned
from longctx.moe.heads import Pairs, mixture_of_heads
from longctx.parallel.attention.api import softmax_attention
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh
from tests.combinations import pairs, pairs_or_everything
from tests.parallel.attention.test_api import grid, schedules
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN

HEADS, KV_HEADS, SHARED, ACTIVE = 12, 6, 4, 3
NAMES = ("q", "k", "v", "routed", "shared", "kinds")


def draw(length, heads=HEADS, kv_heads=KV_HEADS, shared=SHARED):
    generator = torch.Generator().manual_seed(length)
    shapes = [(heads, 6), (kv_heads, 6), (kv_heads, 5), (heads - shared,), (shared,), (2,), (heads, 5)]
    return [torch.randn(2, length, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def route(router, q, routed, shared, kinds, layout):
    if router == "learned":
        return learned(routed, shared, kinds, ACTIVE, layout)
    return by_norm(q[:, :, SHARED:].norm(dim=-1), SHARED, ACTIVE, layout)


def attend(layout, router, schedule, window):
    """Output, balance and gradients on this rank."""
    *leaves, do = (layout.shard(x).clone() for x in draw(layout.length))
    for leaf in leaves:
        leaf.requires_grad_()
    q, k, v, *logits = leaves
    routing = route(router, q, *logits, layout)
    out = mixture_of_heads(q, k, v, routing, layout, 0.4, schedule=schedule, mask=IntervalMask(window=window))
    ((out * do).sum() + 300 * routing.report.loss).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return out.detach(), *grads, routing.report.loss.item(), routing.report.counts


@cache
def masked(bounds, router, window):
    """The same as all heads times the weights."""
    layout = Layout(bounds)
    *leaves, do = draw(bounds[-1])
    for leaf in leaves:
        leaf.requires_grad_()
    q, k, v, *logits = leaves
    routing = route(router, q, *logits, layout)
    out = softmax_attention(q, k, v, layout, 0.4, mask=IntervalMask(window=window)) * routing.weights[..., None]
    ((out * do).sum() + 300 * routing.report.loss).backward()
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return out.detach(), *grads, routing.report.loss.item(), routing.report.counts


def on_rank(cases):
    mesh = Mesh.build("cpu", cp=dist.get_world_size(), ulysses=grid(dist.get_world_size()))
    return [attend(Layout.on(mesh, bounds, order), router, s, window) for bounds, order, router, s, window in cases]


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pairs_or_everything
def test_what_is_routed_equals_all_heads_times_their_weights(ranks, size, combinations):
    # Ulysses gives whole key/value heads: of 2 that shared heads read and 4 that routed ones do.
    fitting = [s for s in schedules(size) if s != "ulysses" or size == 2]
    bounds = [*PACKINGS.values(), *UNEVEN.values()]
    rows = ORDERS, ["learned", "by norm"], fitting, [None, 5]
    if combinations is pairs:
        cases = pairs(bounds[1::2], *rows)
    else:
        cases = pairs(bounds, *rows) + combinations(bounds, *rows)[::5]  # of several hundred
    answers = ranks.run(on_rank, cases, size=size)
    for number, (bounds, order, router, schedule, window) in enumerate(cases):
        layout, case = Layout(bounds, order, size), f"{bounds} {order} {router} {schedule} {window}"
        *wanted, balance, load = masked(bounds, router, window)
        *parts, balances, loads = zip(*(answer[number] for answer in answers), strict=True)
        assert sum(balances) == pytest.approx(balance, rel=1e-12), case
        assert torch.equal(sum(loads), load), case
        for name, part, want in zip(("out", *NAMES), parts, wanted, strict=True):
            assert (layout.unshard(part) - want).norm() <= 1e-10 * max(want.norm(), 1), f"{name} {case}"


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 4), st.data())
def test_pairs_are_those_that_were_chosen_in_order_of_tokens(length, groups, share, data):
    flags = data.draw(
        st.lists(st.booleans(), min_size=2 * length * groups * share, max_size=2 * length * groups * share)
    )
    chosen = torch.tensor(flags, dtype=torch.bool).view(2, length, groups * share)
    pairs = Pairs.of(chosen, groups)
    for b, g in itertools.product(range(2), range(groups)):
        want = chosen[b].unflatten(1, (groups, share))[:, g].flatten().nonzero()[:, 0].tolist()
        got = pairs.index[b, g].tolist()
        assert got == [-1] * (len(got) - len(want)) + want
    x = torch.randn(2, length, groups * share, 3)
    assert torch.equal(pairs.scatter(pairs.gather(x)), x * chosen[..., None])


def test_the_example_in_the_docs_runs_as_printed():
    page = (Path(__file__).parents[2] / "docs/routing.md").read_text()
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, flags=re.MULTILINE)
    (example,) = [textwrap.dedent(block) for block in blocks if "mixture_of_heads(" in block]
    names = {}
    exec(example, names)
    layout, q, k, v, routing, out = (names[name] for name in ("layout", "q", "k", "v", "routing", "out"))
    want = softmax_attention(q, k, v, layout, 64**-0.5) * routing.weights[..., None]
    torch.testing.assert_close(out, want)
    assert (routing.weights > 0).sum(dim=-1).eq(4 + 3).all()
    assert q.grad is not None


def test_shared_heads_read_whole_key_value_heads():
    q, k, v, routed, shared, kinds, _ = draw(8, heads=12, kv_heads=4, shared=4)
    routing = learned(routed, shared, kinds, ACTIVE, Layout((0, 8)))
    with pytest.raises(ValueError, match="12 query heads, of which 4 are shared, over 4 key/value heads: expected"):
        mixture_of_heads(q, k, v, routing, Layout((0, 8)), 1.0)


def test_scores_that_nobody_reads_are_not_computed():
    q, k, v, routed, shared, kinds, _ = (x.float() for x in draw(4096))
    layout = Layout((0, 4096))
    routing = learned(routed, shared, kinds, ACTIVE, layout)
    counts = []
    for function in (
        lambda: softmax_attention(q, k, v, layout, 0.4, schedule="ring"),
        lambda: mixture_of_heads(q, k, v, routing, layout, 0.4, schedule="ring"),
    ):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    # Torch's operator counts the causal square as the whole, the native one the pairs that are seen; what is left of
    # routed heads torch counts by piece, triangles in full where tiles lie on the diagonal.
    square = 2 * 4096**2 * q.shape[0] * HEADS * (q.shape[3] + v.shape[3])
    routed_share = counts[1] - counts[0] * SHARED / HEADS
    assert 0 < routed_share / square < 0.5 * 1.2 * ACTIVE / HEADS

"""Sequences over ranks against other frameworks' context parallelism: torch's ring, DeepSpeed's Ulysses, fla's plan.

torch's `context_parallel` has no handler for the CPU's attention operator; its ring and its head-and-tail order are
called here below that, with the CPU's operator.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.parallel.attention.api import softmax_attention
from longctx.parallel.layout import Layout
from tests.compare.peers import peer
from tests.parallel.cases import layout_here

TOKENS = 48


def draw(query_heads, kv_heads):
    generator = torch.Generator().manual_seed(query_heads)
    shapes = [(2, TOKENS, heads, 8) for heads in (query_heads, kv_heads, kv_heads, query_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def ours(layout, schedule, heads):
    """o, dq, dk, dv of this rank."""
    *qkv, do = map(layout.shard, draw(*heads))
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = softmax_attention(*leaves, layout, 0.3, schedule=schedule)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def largest_difference(got, want):
    return max((x - y).norm().item() / y.norm().item() for x, y in zip(got, want, strict=True))


def against_torch_ring(order, method):
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    flash_grad = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def forward(q, k, v, **options):
        return flash(q, k, v, 0.0, **options)

    def backward(*, query, key, value, out, logsumexp, grad_out, **options):
        return flash_grad(grad_out, query, key, value, out, logsumexp, 0.0, **options)

    cp._cp_options.enable_load_balance = order == "zigzag"
    cp._cp_options.convert_to_f32 = False
    cp._cp_options.rotate_method = {"ring": cp._RotateMethod.ALL_TO_ALL, "all-gather": cp._RotateMethod.ALL_GATHER}[
        method
    ]
    layout, group = layout_here((0, TOKENS), order), dist.group.WORLD
    # Theirs is [B, H, T, D].
    q, k, v, do = (layout.shard(x).transpose(1, 2).contiguous() for x in draw(4, 4))
    out, lse = cp._templated_ring_attention(group, 2, forward, q, k, v, is_causal=True, scale=0.3)[:2]
    grads = cp._templated_ring_attention_backward(
        group, 2, backward, grad_out=do, grad_out_name="grad_out", query=q, key=k, value=v, out=out, logsumexp=lse,
        is_causal=True, scale=0.3,
    )  # fmt: skip
    theirs = [x.transpose(1, 2) for x in (out, *grads[:3])]
    return largest_difference(ours(layout, method, (4, 4)), theirs)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["ring", "all-gather"])
def test_ring_attention_of_torch(ranks, order, method):
    pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")
    assert max(ranks.run(against_torch_ring, order, method)) < 1e-12


@pytest.mark.parametrize("size", [2, 3, 8])
def test_zigzag_is_torchs_head_and_tail(size):
    balancer = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._load_balancer")
    (theirs,) = balancer._HeadTailLoadBalancer(TOKENS, size, "cpu")._generate_indices()
    layout = Layout((0, TOKENS), "zigzag", size)
    ranks = [layout.for_rank(rank).shard(torch.arange(TOKENS), dim=0) for rank in range(size)]
    assert torch.equal(torch.cat(ranks), theirs)


def against_deepspeed(heads):
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.comm.init_distributed("gloo", verbose=False)

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        return out.transpose(1, 2)

    layout = layout_here((0, TOKENS), "contiguous")
    *qkv, do = (layout.shard(x).contiguous() for x in draw(*heads))
    leaves = [x.requires_grad_() for x in qkv]
    theirs = DistributedAttention(attention, dist.group.WORLD, scatter_idx=2, gather_idx=1)(*leaves, 0)
    theirs = [theirs, *torch.autograd.grad(theirs, leaves, do)]
    return largest_difference(ours(layout, "ulysses", heads), theirs)


@pytest.mark.parametrize("heads", [(4, 4), (8, 4)])
def test_ulysses_of_deepspeed(ranks, heads):
    peer("deepspeed")
    assert max(ranks.run(against_deepspeed, heads)) < 1e-12


@st.composite
def packings(draw):
    """A number of ranks, and documents whose lengths together divide by twice that: fla needs it."""
    size = draw(st.sampled_from([2, 3, 4, 8]))
    length = 2 * size * draw(st.integers(1, 8))
    bounds = draw(st.sets(st.integers(1, length - 1), max_size=12))
    return size, (0, *sorted(bounds), length)


@settings(max_examples=200, deadline=None)
@given(packing=packings(), order=st.sampled_from(["contiguous", "zigzag"]))
def test_the_plan_of_fla(packing, order):
    context = peer("fla.ops.cp.context")
    size, bounds = packing
    for rank in range(size):
        theirs = context.get_cp_cu_seqlens(
            torch.tensor(bounds), world_size=size, rank=rank, conv1d_kernel_size=4, layout=order
        )
        layout = Layout(bounds, order, size, rank)
        if order == "contiguous":
            before, conv = [theirs.pre_num_ranks], [theirs.pre_num_conv_tokens]
            after, last = [theirs.post_num_ranks], [theirs.is_last_rank]
        else:
            before, conv = theirs.pre_num_ranks_by_part, theirs.pre_num_conv_tokens_by_part
            after, last = theirs.post_num_ranks_by_part, theirs.is_last_by_part
        edges = {0, layout.local_length}
        for number, (part, local) in enumerate(zip(layout.slices, layout.local, strict=True)):
            edges |= {local.start, local.stop} | {local.start + start for start in layout.starts(part)}
            # The tokens of its document before the slice: what a short convolution may look back on.
            assert int(layout.positions[local.start]) == conv[number]
            begin = next(a for a, b in pairwise(bounds) if a <= part.begin < b)
            step = layout.piece_length
            assert before[number] == part.begin // step - begin // step
            end = next(b for b in bounds[1:] if part.end <= b)
            assert after[number] == (end - 1) // step - part.begin // step
            assert last[number] == (after[number] == 0)
        assert theirs.cu_seqlens.tolist() == sorted(edges)

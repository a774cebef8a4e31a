"""Block attention and the merge of blocks against the dense reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.attention import block as attention
from longctx.kernels.attention import reference
from longctx.kernels.attention import tiled as attention_tiled
from longctx.kernels.attention.block import CAUSAL, FULL

HEADS = [(4, 4), (4, 2), (6, 1)]


def draw(tq, tk, heads, kv_heads, dim=16, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)
    q, do = (torch.randn(batch, tq, heads, dim, generator=generator, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(batch, tk, kv_heads, dim, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, v, do


def masks(tq, tk):
    ragged = torch.rand(tq, tk, generator=torch.Generator().manual_seed(1)) < 0.4
    ragged[tq // 2] = False
    square = {"causal": (CAUSAL, torch.ones(tq, tk, dtype=torch.bool).tril())} if tq == tk else {}
    return {"full": (FULL, torch.ones(tq, tk, dtype=torch.bool)), "tensor": (ragged, ragged), **square}


@pytest.mark.parametrize("backend", [None, "tiled"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (33, 33), (40, 7), (5, 70)])
def test_forward_and_backward_equal_the_reference(tq, tk, heads, kv_heads, backend, monkeypatch):
    monkeypatch.setattr(attention_tiled, "TILE", 16)
    q, k, v, do = draw(tq, tk, heads, kv_heads)
    for name, (mask, dense) in masks(tq, tk).items():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        want, want_lse = reference.softmax_attention(*leaves, dense, 0.3)
        want.backward(do)
        out, lse = attention.forward(q, k, v, mask, 0.3, backend)
        grads = attention.backward(do, q, k, v, out, lse, mask, 0.3, backend)
        torch.testing.assert_close(out, want, rtol=1e-11, atol=1e-11, msg=name)
        torch.testing.assert_close(lse, want_lse, rtol=1e-11, atol=1e-11, msg=name)
        for got, leaf in zip(grads, leaves, strict=True):
            torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_merge_to_the_whole_in_lower_precision(dtype):
    q, k, v, do = draw(64, 64, 4, 2, dim=32, dtype=dtype)
    whole, whole_lse = attention.forward(q, k, v, CAUSAL, 0.2)
    out = torch.zeros(q.shape, dtype=torch.float32)
    lse = torch.full((2, 4, 64), float("-inf"))
    attention.merge_(out[:, :24], lse[:, :, :24], *attention.forward(q[:, :24], k[:, :24], v[:, :24], CAUSAL, 0.2))
    attention.merge_(out[:, 24:], lse[:, :, 24:], *attention.forward(q[:, 24:], k[:, :24], v[:, :24], FULL, 0.2))
    attention.merge_(out[:, 24:], lse[:, :, 24:], *attention.forward(q[:, 24:], k[:, 24:], v[:, 24:], CAUSAL, 0.2))
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    assert (out - whole.float()).norm() < bound * whole.float().norm()
    assert (lse - whole_lse).abs().max() < 1e-4

    out = out.to(dtype)
    dq, dk, dv = attention.backward(do, q, k, v, whole, whole_lse, CAUSAL, 0.2)
    first = attention.backward(do[:, :24], q[:, :24], k[:, :24], v[:, :24], out[:, :24], lse[:, :, :24], CAUSAL, 0.2)
    left = attention.backward(do[:, 24:], q[:, 24:], k[:, :24], v[:, :24], out[:, 24:], lse[:, :, 24:], FULL, 0.2)
    right = attention.backward(do[:, 24:], q[:, 24:], k[:, 24:], v[:, 24:], out[:, 24:], lse[:, :, 24:], CAUSAL, 0.2)
    bound = 3e-6 if dtype == torch.float32 else 2e-2
    for got, want in (
        (torch.cat([first[0], left[0] + right[0]], 1), dq),
        (torch.cat([first[1] + left[1], right[1]], 1), dk),
        (torch.cat([first[2] + left[2], right[2]], 1), dv),
    ):
        assert (got.float() - want.float()).norm() < bound * want.float().norm()


def test_merging_what_sees_nothing_gives_zero_and_never_nan():
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), float("-inf"))
    attention.merge_(out, lse, torch.zeros_like(out), torch.full_like(lse, float("-inf")))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()
    block = torch.randn(1, 3, 2, 4)
    attention.merge_(out, lse, block, torch.zeros_like(lse))
    torch.testing.assert_close(out, block)


@pytest.mark.parametrize("t", [0, 17, 63])
def test_changing_a_key_leaves_earlier_outputs_bitwise_unchanged(t):
    q, k, v, _ = draw(64, 64, 4, 2, dtype=torch.float32)
    before, _ = attention.forward(q, k, v, CAUSAL, 0.2)
    k[:, t], v[:, t] = 50 * torch.randn_like(k[:, t]), 50 * torch.randn_like(v[:, t])
    after, _ = attention.forward(q, k, v, CAUSAL, 0.2)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize(("tq", "tk"), [(0, 3), (3, 0)])
def test_empty_blocks_are_zero_and_see_nothing(tq, tk):
    q, k, v, do = draw(tq, tk, 4, 2)
    out, lse = attention.forward(q, k, v, FULL, 1.0)
    assert not out.any()
    assert torch.isneginf(lse).all()
    for got, like in zip(attention.backward(do, q, k, v, out, lse, FULL, 1.0), (q, k, v), strict=True):
        assert got.shape == like.shape
        assert not got.any()


def test_head_counts_that_do_not_divide_are_refused():
    q, k, v, _ = draw(4, 4, 4, 3)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention.forward(q, k, v, FULL, 1.0)


def test_gradcheck_of_the_reference():
    q, k, v, _ = draw(4, 5, 2, 1, dim=3, batch=1)
    mask = torch.ones(4, 5, dtype=torch.bool).tril()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: reference.softmax_attention(*x, mask, 0.5)[0], inputs)


def test_the_flops_of_a_block_are_counted():
    q, k, v = torch.randn(2, 10, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    with FlopCounterMode(display=False) as counter:
        out, lse = attention.forward(q, k, v, FULL, 0.3)
    assert counter.get_total_flops() == 2 * 4 * 10 * 12 * (2 * 8 + 2 * 8)
    with FlopCounterMode(display=False) as counter:
        attention.backward(out, q, k, v, out, lse, FULL, 0.3)
    # The scores once more, and two gradients of each of the two products.
    assert counter.get_total_flops() == 2 * 4 * 10 * 12 * 5 * 2 * 8


@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_the_compiler_takes_a_block_whole(mask):
    q, k, v = (torch.randn(1, 9, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    compiled = torch.compile(lambda *x: attention.forward(*x, mask, 0.3), backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(q, k, v), attention.forward(q, k, v, mask, 0.3), strict=True):
        assert torch.equal(got, want)

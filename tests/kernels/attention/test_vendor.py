"""Vendor operators that run on a CPU: padded head dims, masks, dtypes, the global lse and FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.attention.masks import CAUSAL, FULL, sliding_window
from longctx.kernels.attention.tiled import Tiled
from longctx.kernels.attention.vendor import CpuFlash, PaddedOperator, padded
from tests.kernels.attention.cases import by_reference, dense, draw, last

F64 = torch.float64


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("multiple", "size"), [(1, 5), (8, 8), (5, 5), (3, 6)])
def test_last_dims_are_padded_with_zeros_to_one_multiple(multiple, size):
    tensors = torch.ones(2, 3, 5), torch.ones(2, 3, 2)
    for x, y in zip(tensors, padded(multiple, *tensors), strict=True):
        assert y.shape == (2, 3, size)
        assert torch.equal(y[..., : x.shape[-1]], x)
        assert not y[..., x.shape[-1] :].any()
        assert (y is x) == (x.shape[-1] == size)


def test_a_tensor_that_needs_no_padding_is_made_dense():
    (x,) = padded(4, torch.zeros(2, 4, 3).transpose(1, 2))
    assert x.stride(-1) == 1


class Sixteen(PaddedOperator):
    """Computes densely, and accepts one head dim, a multiple of 16."""

    multiple = 16

    def operator(self, q, k, v, mask, scale):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16
        return Tiled().block_forward(q, k, v, mask, scale)

    def operator_backward(self, do, q, k, v, out, lse, mask, scale):
        assert {x.shape[-1] for x in (do, q, k, v, out)} == {16}
        return Tiled().block_backward(do, q, k, v, out, lse, mask, scale)


@pytest.mark.parametrize("backend", [Sixteen(), CpuFlash()], ids=["padded", "cpu-flash"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 9), (9, 5)])
@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_head_dims_that_differ_equal_the_dense_reference(mask, key_dim, value_dim, heads, kv_heads, backend):
    q, k, v, do = draw(6, 6, heads, kv_heads, key_dim, value_dim)
    visible = torch.ones(6, 6, dtype=torch.bool)
    want = by_reference(q, k, v, do, visible.tril() if mask is CAUSAL else visible, 0.3)
    out, lse = backend.forward(q, k, v, mask, 0.3)
    for got, ref in zip((out, lse, *backend.backward(do, q, k, v, out, lse, mask, 0.3)), want, strict=True):
        close(got, ref)


@pytest.mark.parametrize("per_head", [False, True])
def test_cpu_flash_takes_bool_masks_and_a_query_that_sees_nothing(per_head):
    mask = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = mask if per_head else mask[0]
    mask[..., 2, :] = False
    q, k, v, do = draw(5, 7, 4, 4)
    want = by_reference(q, k, v, do, mask, 0.3)
    heads_first = [x.transpose(1, 2) for x in (do, q, k, v)]
    out, lse = CpuFlash().block_forward(*heads_first[1:], mask, 0.3)
    assert torch.isneginf(lse[:, :, 2]).all()
    grads = CpuFlash().block_backward(*heads_first, out, lse, mask, 0.3)
    for got, ref in zip((out, *grads), (want[0], *want[2:]), strict=True):
        close(got.transpose(1, 2), ref)
    close(lse, want[1])


def test_cpu_flash_by_positions_equals_the_dense_reference():
    mask = sliding_window(9, 12, last(4), offset=2)
    q, k, v, do = draw(9, 12)
    want = by_reference(q, k, v, do, dense(mask), 0.3)
    out, lse = CpuFlash().forward(q, k, v, mask, 0.3)
    for got, ref in zip((out, lse, *CpuFlash().backward(do, q, k, v, out, lse, mask, 0.3)), want, strict=True):
        close(got, ref)


def test_cpu_flash_takes_the_global_out_and_lse():
    q, k, v, do = draw(5, 12)
    out, lse, dq, dk, dv = by_reference(q, k, v, do, torch.ones(5, 12, dtype=torch.bool), 0.3)
    parts = [CpuFlash().backward(do, q, k[:, at], v[:, at], out, lse, FULL, 0.3) for at in (slice(5), slice(5, 12))]
    close(parts[0][0] + parts[1][0], dq)
    close(torch.cat([part[1] for part in parts], dim=1), dk)
    close(torch.cat([part[2] for part in parts], dim=1), dv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_cpu_flash_computes_in_the_accumulation_dtype(dtype):
    q, k, v, do = draw(4, 4, 2, 2, dtype=dtype)
    wide = F64 if dtype == F64 else torch.float32
    assert {x.dtype for x in CpuFlash().operands(q, k)} == {wide}
    out, lse = CpuFlash().forward(q, k, v, CAUSAL, 0.3)
    assert out.dtype == lse.dtype == wide
    want, *_ = by_reference(*(x.double() for x in (q, k, v, do)), torch.ones(4, 4, dtype=torch.bool).tril(), 0.3)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_flops_of_cpu_flash_are_counted_and_ignore_the_mask():
    q, k, v, do = draw(6, 6, 4, 4)
    counts = []
    for mask in (FULL, CAUSAL):
        with FlopCounterMode(display=False) as counter:
            out, lse = CpuFlash().forward(q, k, v, mask, 0.3)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            CpuFlash().backward(do, q, k, v, out, lse, mask, 0.3)
        counts.append((forward, counter.get_total_flops()))
    product = 2 * 2 * 4 * 6 * 6 * 8
    assert counts == [(2 * product, 5 * product)] * 2

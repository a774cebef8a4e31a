"""The dense reference attention against softmax, row by row."""

import math

import pytest
import torch

from longctx.kernels.attention.reference import softmax_attention
from tests.kernels.attention.cases import draw


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_a_query_head_averages_the_values_that_it_sees_with_softmax_weights(heads, kv_heads):
    q, k, v, _ = draw(5, 7, heads, kv_heads, value_dim=3)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(1)
    out, lse = softmax_attention(q, k, v, mask, 0.3)
    assert out.shape == (2, 5, heads, 3)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        for i in range(5):
            seen = mask[i]
            scores = 0.3 * (k[1, seen, kv_head] @ q[1, i, head])
            torch.testing.assert_close(out[1, i, head], scores.softmax(0) @ v[1, seen, kv_head])
            torch.testing.assert_close(lse[1, head, i], scores.exp().sum().log())


def test_a_query_that_sees_nothing_has_zero_output_lse_minus_infinity_and_no_gradient():
    q, k, v, do = draw(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = softmax_attention(*leaves, mask, 0.3)
    assert not out[:, 1].any()
    assert torch.isneginf(lse[:, :, 1]).all()
    assert torch.isfinite(lse[:, :, [0, 2]]).all()
    out.backward(do)
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    assert not q.grad[:, 1].any()


def test_one_key_is_its_value_whatever_the_score():
    q, k, v, _ = draw(1, 1)
    out, lse = softmax_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool), 50.0)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(lse[..., 0], 50.0 * (q * k.repeat_interleave(2, dim=2)).sum(-1)[:, 0])


def test_equal_scores_have_the_log_of_their_number_as_lse():
    q, k, v, _ = draw(2, 6)
    out, lse = softmax_attention(torch.zeros_like(q), k, v, torch.ones(2, 6, dtype=torch.bool), 1.0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(6)))
    torch.testing.assert_close(out[:, 0], v.mean(dim=1).repeat_interleave(2, dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_dtype_is_kept(dtype):
    q, k, v, _ = draw(2, 3, dtype=dtype)
    out, lse = softmax_attention(q, k, v, torch.ones(2, 3, dtype=torch.bool), 1.0)
    assert out.dtype == lse.dtype == dtype

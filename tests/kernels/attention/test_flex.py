"""FlexAttention as a backend: the block mask that it receives, and plain masks with the uncompiled operator."""

import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from longctx.kernels.attention.flex import Flex
from longctx.kernels.attention.masks import CAUSAL, FULL, sliding_window
from tests.kernels.attention.cases import by_reference, dense, draw, last, masks

uncompiled = pytest.mark.filterwarnings("ignore")
"""FlexAttention warns that it materializes all scores."""


def dense_of(mask, tq, tk):
    visible = torch.ones(tq, tk, dtype=torch.bool)
    return visible if mask is FULL else visible.tril() if mask is CAUSAL else dense(mask)


CASES = {
    "full": (FULL, 5, 19),
    "causal": (CAUSAL, 19, 19),
    "causal, one token": (CAUSAL, 1, 1),
    "window": (sliding_window(21, 30, last(6), offset=4), 21, 30),
    "documents": (masks()["documents"], 60, 60),
    "nothing seen": (masks()["nothing seen"], 5, 10),
    "gathered": (masks()["gathered"], 21, 60),
}
each_case = pytest.mark.parametrize(("mask", "tq", "tk"), CASES.values(), ids=CASES.keys())


@each_case
def test_the_block_mask_lists_exactly_the_tiles_in_which_a_query_sees_a_key(mask, tq, tk, monkeypatch):
    monkeypatch.setattr(Flex, "TILE", 8)
    q, k, _, _ = draw(tq, tk)
    block_mask = Flex()._block_mask(mask, q, k)
    visible = dense_of(mask, tq, tk)
    visible = visible if visible.dim() == 4 else visible[None, None]
    padded = torch.nn.functional.pad(visible, (0, -tk % 8, 0, -tq % 8))
    want = padded.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).any(dim=5).any(dim=3)
    assert torch.equal(block_mask.to_dense().bool(), want)
    assert block_mask.seq_lengths == (tq, tk)


@each_case
def test_the_mask_function_shows_exactly_the_keys_that_a_query_sees(mask, tq, tk):
    q, k, _, _ = draw(tq, tk)
    shown = Flex()._block_mask(mask, q, k).mask_mod
    places = torch.meshgrid(*(torch.arange(n) for n in (2, 4, tq, tk)), indexing="ij")
    assert torch.equal(shown(*places), dense_of(mask, tq, tk).expand(2, 4, tq, tk))


@uncompiled
def test_the_uncompiled_operator_equals_the_dense_reference():
    mask, tq, tk = CASES["causal"]
    q, k, v, do = draw(tq, tk, dtype=torch.float32)
    out, lse = Flex(attend=flex_attention).forward(q, k, v, mask, 0.3)
    want = by_reference(*(x.double() for x in (q, k, v, do)), dense_of(mask, tq, tk), 0.3)
    torch.testing.assert_close(out.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)
    assert not out.requires_grad


@uncompiled
def test_a_query_that_sees_nothing_has_zero_output_and_lse_minus_infinity():
    mask, tq, tk = CASES["nothing seen"]
    q, k, v, _ = draw(tq, tk, dtype=torch.float32)
    out, lse = Flex(attend=flex_attention).forward(q, k, v, mask, 0.3)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_the_operator_receives_dense_heads_first_and_whether_heads_are_grouped():
    received = []

    def attend(q, k, v, *, block_mask, scale, enable_gqa, return_aux):
        received.append(([x.shape for x in (q, k, v)], [x.stride(-1) for x in (q, k, v)], scale, enable_gqa))
        assert return_aux.lse
        return q[..., :5] * 1.0, types.SimpleNamespace(lse=q[..., 0])

    q, k, v, _ = draw(6, 9, 4, 2, value_dim=5)
    strided = k.transpose(1, 3).contiguous().transpose(1, 3)
    out, lse = Flex(attend).forward(q, strided, v, FULL, 0.3)
    assert received == [([(2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 5)], [1, 1, 1], 0.3, True)]
    assert torch.equal(out, q[..., :5])
    assert torch.equal(lse, q[..., 0].transpose(1, 2))
    Flex(attend).forward(q, q, q, FULL, 0.3)
    assert received[1][3] is False


def test_gradients_of_the_block_are_zero_where_the_global_lse_is_minus_infinity():
    """A query that sees nothing in any block."""

    def attend(q, k, v, *, block_mask, scale, enable_gqa, return_aux):
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(torch.arange(4)[:, None] == 1, -1e4)
        lse = scores.logsumexp(-1)
        blind = torch.arange(4) == 1
        weights = scores.softmax(-1) * ~blind[:, None]
        return weights @ v, types.SimpleNamespace(lse=lse.masked_fill(blind, float("-inf")))

    q, k, v, do = draw(4, 5, 2, 2)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1] = False
    out, lse, *want = by_reference(q, k, v, do, mask, 0.3)
    for got, ref in zip(Flex(attend).backward(do, q, k, v, out, lse, FULL, 0.3), want, strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-11)

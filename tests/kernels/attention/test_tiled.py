"""Block attention in tiles: the merge by lse, tiles of keys and of positions, grouped heads, the global lse."""

import math

import pytest
import torch

from longctx.kernels.attention import tiled
from longctx.kernels.attention.masks import CAUSAL, FULL, Positions
from longctx.kernels.attention.tiled import Tiled, dense_rows, finite, merge_
from tests.kernels.attention.cases import by_reference, dense, draw, gathered, masks

INF = float("inf")


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def dense_mask(mask, tq, tk):
    if isinstance(mask, torch.Tensor):
        return mask
    ones = torch.ones(tq, tk, dtype=torch.bool)
    return ones.tril() if mask is CAUSAL else ones


def check(mask, visible, q, k, v, do):
    want = by_reference(q, k, v, do, visible, 0.3)
    out, lse = Tiled().forward(q, k, v, mask, 0.3)
    for got, ref in zip((out, lse, *Tiled().backward(do, q, k, v, out, lse, mask, 0.3)), want, strict=True):
        close(got, ref)


def ragged(tq, tk):
    """A mask with a query that sees nothing and one that sees only the last key."""
    mask = torch.rand(tq, tk, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[1], mask[2] = False, torch.arange(tk) == tk - 1
    return mask


def test_rows_are_copied_only_where_their_last_dim_is_strided():
    x = torch.arange(24.0).view(2, 3, 4)
    assert dense_rows(x) is x
    assert dense_rows(x.transpose(0, 1)).data_ptr() == x.data_ptr()
    strided = x.transpose(1, 2)
    assert dense_rows(strided).stride(-1) == 1
    assert torch.equal(dense_rows(strided), strided)


def test_finite_replaces_only_minus_infinity():
    x = torch.tensor([-INF, -3.0, 0.0, INF])
    assert finite(x).tolist() == [0.0, -3.0, 0.0, INF]
    assert x[0] == -INF


def test_blocks_of_keys_merge_to_all_keys_in_any_order():
    q, k, v, do = draw(5, 12)
    mask = ragged(5, 12)
    mask[3, :4] = False  # sees nothing in the first block
    want_out, want_lse, *_ = by_reference(q, k, v, do, mask, 0.3)
    for order in ([0, 4, 5], [5, 0, 4], [4, 5, 0]):
        out, lse = torch.zeros_like(want_out), torch.full_like(want_lse, -INF)
        for begin in order:
            at = slice(begin, {0: 4, 4: 5, 5: 12}[begin])
            merge_(out, lse, *Tiled().forward(q, k[:, at], v[:, at], mask[:, at], 0.3))
        close(out, want_out)
        close(lse, want_lse)


def test_a_merge_does_not_overflow():
    out, lse = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 5000.0, dtype=torch.float64)
    merge_(out, lse, torch.ones_like(out), lse + 1)
    assert out.item() == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-11)
    assert lse.item() == pytest.approx(5001 + math.log1p(math.exp(-1)), rel=1e-15)


@pytest.mark.parametrize("tile", [1, 4, 1000])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, "ragged"], ids=str)
def test_tiles_of_keys_equal_the_dense_reference(mask, tile, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", tile)
    mask = ragged(9, 9) if mask == "ragged" else mask
    check(mask, dense_mask(mask, 9, 9), *draw(9, 9, value_dim=5))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_query_heads_of_a_group_share_keys_and_sum_their_gradients(heads, kv_heads):
    mask = ragged(5, 7)
    check(mask, mask, *draw(5, 7, heads, kv_heads, value_dim=3))


def test_one_query_of_one_key():
    check(CAUSAL, dense_mask(CAUSAL, 1, 1), *draw(1, 1))


@pytest.mark.parametrize("name", ["zigzag halves, documents, window", "nothing seen", "one token"])
def test_positions_in_small_tiles_equal_the_dense_reference(name, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 16)
    monkeypatch.setattr(tiled, "QUERY_TILES", (8, 16))
    mask = masks()[name]
    check(mask, dense(mask), *draw(mask.query.shape[-1], len(mask.key)))


@pytest.mark.parametrize(("heads", "kv_heads", "together"), [(4, 2, 3), (4, 1, 2)])
def test_heads_with_their_own_queries_equal_the_dense_reference(heads, kv_heads, together, monkeypatch):
    monkeypatch.setattr(tiled, "TOGETHER", together)
    mask = gathered(7, 20, heads=heads)
    check(mask, dense(mask), *draw(7, 20, heads, kv_heads))


def test_rows_of_queries_that_see_nothing_are_not_read():
    mask = gathered(6, 20)  # the first head of each sequence begins with 2 queries of padding
    q, k, v, do = draw(6, 20)
    out, lse = Tiled().forward(q, k, v, mask, 0.3)
    want = Tiled().backward(do, q, k, v, out, lse, mask, 0.3)
    for x in (q, do):
        x[:, :2, 0] = torch.nan
    got_out, got_lse = Tiled().forward(q, k, v, mask, 0.3)
    close(got_out, out)
    close(got_lse, lse)
    for got, ref in zip(Tiled().backward(do, q, k, v, out, lse, mask, 0.3), want, strict=True):
        close(got, ref)


def test_gradients_of_blocks_with_the_global_out_and_lse_sum_to_those_of_all_keys():
    q, k, v, do = draw(5, 12)
    out, lse, dq, dk, dv = by_reference(q, k, v, do, torch.ones(5, 12, dtype=torch.bool), 0.3)
    parts = [Tiled().backward(do, q, k[:, at], v[:, at], out, lse, FULL, 0.3) for at in (slice(5), slice(5, 12))]
    close(parts[0][0] + parts[1][0], dq)
    close(torch.cat([part[1] for part in parts], dim=1), dk)
    close(torch.cat([part[2] for part in parts], dim=1), dv)


def test_bfloat16_is_merged_and_summed_in_float32():
    q, k, v, do = draw(9, 9, 2, 2, dtype=torch.bfloat16)
    mask = Positions(torch.arange(9), torch.arange(9))
    out, lse = Tiled().forward(q, k, v, mask, 0.3)
    grads = Tiled().backward(do, q, k, v, out, lse, mask, 0.3)
    want = by_reference(*(x.double() for x in (q, k, v, do)), dense(mask), 0.3)
    for got, ref in zip((out, lse, *grads), want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("seen", "want"), [(0, 256), (100, 256), (8 * 512, 512), (8 * 600, 512), (10**6, 1024)])
def test_query_tiles_are_a_power_of_two_near_an_eighth_of_the_keys_seen(seen, want):
    begin = torch.zeros(4, dtype=torch.int32)
    assert tiled._query_tile(begin, begin + seen) == want
    assert tiled._query_tile(begin[:0], begin[:0]) == 256

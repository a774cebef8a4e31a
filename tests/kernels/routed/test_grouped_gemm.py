"""Grouped GEMM against one matrix product per group."""

import pytest
import torch
from torch.nn import functional as F

from longctx.kernels.routed import grouped_gemm
from longctx.kernels.routed.grouped_gemm import grouped_matmul, grouped_outer_product

COUNTS = {"ragged": (3, 0, 5, 1), "all to one": (0, 9, 0, 0), "one row": (0, 0, 0, 1), "no rows": (0, 0, 0, 0)}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
each_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
each_dtype = pytest.mark.parametrize(("dtype", "bound"), DTYPES.items(), ids=str)
each_width = pytest.mark.parametrize(("dim", "hidden"), [(8, 16), (5, 3)], ids=["aligned", "odd"])


def draw(counts, dtype, dim, hidden):
    generator = torch.Generator().manual_seed(0)
    shapes = (sum(counts), dim), (sum(counts), hidden), (len(counts), dim, hidden)
    x, y, weights = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return x, y, weights, torch.tensor(counts).cumsum(0).to(torch.int32)


def near(got, want, bound):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= bound * want.norm()


@each_width
@each_dtype
@each_count
def test_rows_are_multiplied_by_the_weights_of_their_group(counts, dtype, bound, dim, hidden):
    x, _, weights, ends = draw(counts, dtype, dim, hidden)
    groups = zip(x.double().split(list(counts)), weights.double(), strict=True)
    got = grouped_matmul(x, weights, ends)
    assert got.dtype == dtype
    near(got, torch.cat([rows @ weight for rows, weight in groups]), bound)


@each_width
@each_dtype
@each_count
def test_outer_products_are_summed_per_group_and_zero_for_empty_ones(counts, dtype, bound, dim, hidden):
    x, y, _, ends = draw(counts, dtype, dim, hidden)
    groups = zip(x.double().split(list(counts)), y.double().split(list(counts)), strict=True)
    got = grouped_outer_product(x, y, ends)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near(got, torch.stack([a.T @ b for a, b in groups]), bound)
    assert not got[torch.tensor(counts) == 0].any()


@each_dtype
def test_one_group_is_one_matrix_product(dtype, bound):
    x, y, weights, ends = draw((6,), dtype, 8, 4)
    near(grouped_matmul(x, weights, ends), x.double() @ weights[0].double(), bound)
    near(grouped_outer_product(x, y, ends), (x.double().T @ y.double())[None], bound)


def test_strided_rows_equal_dense_ones():
    x, y, weights, ends = draw((3, 0, 5, 1), torch.float32, 8, 16)
    wide, other = x.T.contiguous().T, y.T.contiguous().T
    torch.testing.assert_close(grouped_matmul(wide, weights, ends), grouped_matmul(x, weights, ends))
    torch.testing.assert_close(grouped_outer_product(wide, other, ends), grouped_outer_product(x, y, ends))


@pytest.mark.parametrize(
    ("widths", "dtype", "aligned"),
    [
        ((4, 8), torch.float32, True),
        ((4, 6), torch.float32, False),
        ((8, 16), torch.bfloat16, True),
        ((4, 8), torch.bfloat16, False),
        ((0, 8), torch.float32, False),
        ((8, 8), torch.float64, False),
    ],
)
def test_only_supported_dtypes_and_rows_of_16_bytes_call_the_grouped_operator(widths, dtype, aligned, monkeypatch):
    calls = []
    grouped_mm = F.grouped_mm
    monkeypatch.setattr(grouped_gemm.F, "grouped_mm", lambda *a, **kw: calls.append(1) or grouped_mm(*a, **kw))
    x, y, weights, ends = draw((2, 3), dtype, *widths)
    grouped_matmul(x, weights, ends)
    grouped_outer_product(x, y, ends)
    assert len(calls) == (2 if aligned else 0)

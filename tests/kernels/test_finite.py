"""Rows with numbers that are not finite: found, replaced, and brought to other numbers of heads."""

import torch

from longctx.kernels.finite import all_finite, bad_rows, per_head, without

NAN, INF = float("nan"), float("inf")


def test_infinities_that_cancel_in_a_sum_are_found():
    assert all_finite(torch.ones(3), torch.zeros(0))
    assert not all_finite(torch.ones(3), torch.tensor([INF, -INF]))
    assert not all_finite(torch.tensor([1.0, NAN]))


def test_rows_are_found_and_replaced_whole():
    x = torch.tensor([[1.0, NAN], [2.0, 3.0], [-INF, 4.0]])
    assert bad_rows(x).tolist() == [True, False, True]
    assert without(x, bad_rows(x)).tolist() == [[0, 0], [2, 3], [0, 0]]


def test_flags_per_head_are_repeated_or_joined():
    bad = torch.tensor([[[True, False]]])
    assert per_head(bad, 4).tolist() == [[[True, True, False, False]]]
    assert per_head(torch.tensor([[[True, False, False, False]]]), 2).tolist() == [[[True, False]]]
    assert torch.equal(per_head(bad, 2), bad)

"""Rows with numbers that are not finite: found, replaced, and brought to other numbers of heads."""

from types import SimpleNamespace

import torch

from longctx.kernels.finite import all_finite, bad_rows, checks_on_cuda, is_checked, per_head, without

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


def test_on_cuda_results_are_checked_where_that_is_asked_for():
    on_cpu, on_cuda = SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True)
    assert is_checked(on_cpu)
    assert not is_checked(on_cuda)
    with checks_on_cuda():
        assert is_checked(on_cuda)
    assert not is_checked(on_cuda)


def test_under_compile_nothing_is_checked():
    seen = []

    def function(x):
        if is_checked(x):
            x = x + 1
        seen.append(torch.compiler.is_compiling())
        return x * 2

    assert torch.compile(function, backend="eager")(torch.ones(1)).item() == 2
    assert function(torch.ones(1)).item() == 4

"""The reference implementations against torch's own functions and values by hand."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from longctx.kernels.reference import linear_cross_entropy, rms_norm, short_convolution, swiglu

F64 = torch.float64


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def causal(x, weight, bias, before):
    """The depthwise causal convolution by torch."""
    padded = torch.cat([before, x], dim=1).transpose(1, 2)
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 4])
def test_a_short_convolution_is_the_depthwise_causal_convolution(taps, activation):
    x, weight, bias, before = draw((2, 6, 3), (3, taps), (3,), (2, taps - 1, 3))
    function = F.silu if activation else lambda y: y
    close(short_convolution(x, weight, bias, activation), function(causal(x, weight, bias, torch.zeros_like(before))))
    close(short_convolution(x, weight, None, activation, (), before), function(causal(x, weight, None, before)))


def test_the_last_tap_is_the_current_token():
    x = torch.tensor([1.0, 2.0, 3.0], dtype=F64).view(1, 3, 1)
    weight = torch.tensor([[10.0, 1.0]], dtype=F64)
    assert short_convolution(x, weight).flatten().tolist() == [1, 12, 23]


@pytest.mark.parametrize("starts", [(2,), (0, 2, 3)])
def test_taps_reach_back_to_the_start_of_the_document(starts):
    x, weight, bias, before = draw((2, 6, 3), (3, 4), (3,), (2, 3, 3))
    got = short_convolution(x, weight, bias, None, starts, before)
    bounds = sorted({0, *starts, 6})
    for begin, end in itertools.pairwise(bounds):
        first = before if begin not in starts else None
        close(got[:, begin:end], short_convolution(x[:, begin:end], weight, bias, before=first))


def test_a_convolution_of_no_token_is_empty():
    assert short_convolution(torch.zeros(2, 0, 3), torch.ones(3, 4)).shape == (2, 0, 3)


def test_cross_entropy_is_torchs_and_zero_at_ignored_labels():
    x, weight = draw((5, 4), (7, 4))
    labels = torch.tensor([3, -100, 0, 6, -100])
    want = F.cross_entropy(x @ weight.T, labels, reduction="none", ignore_index=-100)
    got = linear_cross_entropy(x, weight, labels)
    close(got, want)
    assert got[[1, 4]].tolist() == [0, 0]
    assert (got[[0, 2, 3]] > 0).all()


def test_ignored_labels_have_no_gradient():
    x, weight = (t.requires_grad_() for t in draw((2, 4), (7, 4)))
    linear_cross_entropy(x, weight, torch.tensor([-100, 3])).sum().backward()
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_rms_norm_is_torchs():
    x, scale = draw((2, 5, 6), (6,))
    close(rms_norm(x, scale, 0.25), F.rms_norm(x, (6,), scale, 0.25))
    (gate,) = draw((2, 5, 6))
    close(rms_norm(x, gate, 0.25), F.rms_norm(x, (6,), None, 0.25) * gate)
    assert not rms_norm(torch.zeros(3, 6), torch.ones(6), 1e-5).any()


def test_swiglu_gates_the_second_half_with_the_first():
    (x,) = draw((2, 5, 6))
    close(swiglu(x), F.silu(x[..., :3]) * x[..., 3:])
    assert swiglu(torch.zeros(0, 6)).shape == (0, 3)

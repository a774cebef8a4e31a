"""The convolution's Triton kernels, in the interpreter, against the token-by-token reference."""

import pytest
import torch

from longctx.kernels import convolution
from longctx.kernels.linear.recurrence import Segment
from tests.combinations import mostly_slow_rows
from tests.kernels.test_convolution import STARTS, by_reference, draw

triton_convolution = pytest.importorskip("longctx.kernels.triton_convolution")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(triton_convolution, "BLOCK_T", 16)
    monkeypatch.setattr(triton_convolution, "BLOCK_D", 16)
    monkeypatch.setattr(triton_convolution, "BACKWARD_T", 16)
    monkeypatch.setattr(triton_convolution, "BACKWARD_D", 16)


def encoded(segments):
    return convolution._encode(segments)


def by_triton(case, activation, segments, before):
    arguments = case.x, case.weight, case.bias, before, *encoded(segments), activation
    y = triton_convolution.forward(*arguments)
    dx, dweight, dbias, dbefore = triton_convolution.backward(case.dy, *arguments)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "dbefore": dbefore}


def by_torch(case, activation, segments, before):
    arguments = case.x, case.weight, case.bias, before, *encoded(segments), activation
    y = convolution._forward(*arguments)
    dx, dweight, dbias, dbefore = convolution._backward(case.dy, *arguments)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "dbefore": dbefore}


@pytest.mark.parametrize(
    ("width", "activation", "starts"),
    mostly_slow_rows(
        [(*x, starts) for x in ((1, "silu"), (2, None), (4, "silu"), (5, None), (8, "silu")) for starts in STARTS],
        lambda width, _, starts: (width, starts) in [(1, "inside"), (2, "neighbours"), (4, "inside"), (4, "none")],
    ),
)
def test_values_and_gradients_equal_the_reference(width, activation, starts):
    starts = STARTS[starts]
    for length in (1, 16, 19, 35):
        case = draw(length, width, bias=width != 2)
        want = by_reference(case, activation, starts(length))
        segments = [Segment(0, length, starts(length))]
        got = by_triton(case.to(torch.float32), activation, segments, case.before.float()[None])
        for name, expected in want.items():
            if name == "dbefore":
                expected = expected[None]
            bound = 1e-6 * (1 + expected.norm().item())
            torch.testing.assert_close(got[name].double(), expected, rtol=1e-5, atol=bound, msg=f"{name}, {length}")
        if case.bias is None:
            assert got["dbias"].numel() == 0


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.float32, torch.float16))]
)
def test_segments_of_any_length_in_any_order_equal_those_in_torch(dtype):
    case = draw(41, 4, batch=1, channels=21).to(torch.float32)
    segments = [Segment(20, 41, (0, 5, 6, 17)), Segment(0, 2), Segment(2, 2), Segment(2, 20, (11,))]
    before = torch.randn(4, 1, 3, 21, generator=torch.Generator().manual_seed(1)).to(dtype)
    low = case.to(dtype)
    want = by_torch(low.to(torch.float64), "silu", segments, before.double())
    for name, got in by_triton(low, "silu", segments, before).items():
        assert got.dtype == dtype, name
        bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (got.double() - want[name]).norm() <= bound * want[name].norm(), name


def test_strided_inputs_and_parameters_of_another_dtype():
    case = draw(19, 4, batch=2, channels=6).to(torch.float32)
    x = torch.stack([case.x, case.x], dim=-1)[..., 0]  # channels two apart
    dy = case.dy.transpose(0, 1).contiguous().transpose(0, 1)
    segments, before = [Segment(0, 19, (7,))], case.before[None]
    want = by_torch(case, "silu", segments, before)
    arguments = case.weight.bfloat16().float(), case.bias, before, *encoded(segments), "silu"
    y = triton_convolution.forward(x, case.weight.double(), *arguments[1:])
    torch.testing.assert_close(y, want["y"])
    grads = triton_convolution.backward(dy, x, case.weight.double(), *arguments[1:])
    torch.testing.assert_close(grads[0], want["dx"])
    assert grads[1].dtype == torch.float64


def test_a_token_changes_nothing_before_it_and_nothing_in_other_documents():
    case = draw(30, 4).to(torch.float32)
    segments, before = [Segment(0, 30, (9, 20))], case.before[None]
    want = by_triton(case, "silu", segments, before)
    changed = case.x.clone()
    changed[:, 13] = float("nan")
    got = triton_convolution.forward(changed, case.weight, case.bias, before, *encoded(segments), "silu")
    assert torch.equal(got[:, :13], want["y"][:, :13])
    assert torch.equal(got[:, 20:], want["y"][:, 20:])
    assert got[:, 13:17].isnan().all()


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_reach_is_the_tokens_of_the_document_before_a_token(taps):
    bounds, starts = (0, 5, 5, 5, 5, 14), (3, 5, 6, 9)
    reach = triton_convolution.token_reach(bounds, starts, taps)
    for t in range(14):
        first = max((s for s in starts if s <= t and not (s < 5 <= t)), default=None)
        assert reach[t] == (taps - 1 if first is None else min(taps - 1, t - first)), t


def test_without_tokens_the_tokens_before_have_a_gradient_of_zero():
    case = draw(0, 4).to(torch.float32)
    grads = triton_convolution.backward(
        case.dy, case.x, case.weight, case.bias, case.before[None], *encoded([Segment(0, 0)]), "silu"
    )
    assert [g.abs().sum().item() for g in grads] == [0.0] * 4


@pytest.mark.slow
def test_tokens_that_lie_more_than_2_31_elements_apart():
    """A million tokens of 2,048 channels; here three, far apart in memory that nothing else touches."""
    case = draw(3, 4, channels=8).to(torch.float32)
    stride = 2**30 + 16
    x, dy = (torch.empty(2 * stride + 8, dtype=torch.bfloat16).as_strided((1, 3, 8), (0, stride, 1)) for _ in range(2))
    x.copy_(case.x[:1])
    dy.copy_(case.dy[:1])
    arguments = case.weight, case.bias, case.before[None, :1], *encoded([Segment(0, 3)]), "silu"
    want = triton_convolution.forward(x.contiguous(), *arguments)
    assert torch.equal(triton_convolution.forward(x, *arguments), want)
    near = triton_convolution.backward(dy.contiguous(), x.contiguous(), *arguments)
    far = triton_convolution.backward(dy, x, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))

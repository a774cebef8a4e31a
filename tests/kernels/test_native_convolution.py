"""The short convolution in C++ against its equation in float64."""

from dataclasses import replace

import pytest
import torch

from longctx.kernels import native_convolution, reference
from longctx.kernels.convolution import causal_convolution
from longctx.kernels.linear.recurrence import Segment
from longctx.kernels.native import library
from tests.kernels.test_convolution import SEGMENTS, STARTS, by_kernel, by_reference, draw, each_activation, gradients

pytestmark = pytest.mark.skipif(
    not library.is_enabled() or library.load(native_convolution.FAMILY) is None, reason="needs a C++ compiler"
)
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
each_dtype = pytest.mark.parametrize("dtype", BOUNDS)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """The native passes that run."""
    calls, run = [], native_convolution._run

    def counting(name, *arguments, **named):
        calls.append(name)
        run(name, *arguments, **named)

    monkeypatch.setattr(native_convolution, "_run", counting)
    return calls


def check(case, activation, starts):
    wide = by_reference(case.to(torch.float64), activation, starts)
    for name, got in by_kernel(case, activation, starts).items():
        assert got.dtype == case.x.dtype, name
        assert (got.double() - wide[name]).norm() <= BOUNDS[got.dtype] * wide[name].norm(), name


@each_dtype
@each_activation
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 8, 17])
def test_values_and_gradients_equal_the_reference(taps, starts, activation, dtype, counted):
    for length, channels, bias in ((1, 5, True), (3, 16, False), (22, 37, True)):
        check(draw(length, taps, channels=channels, bias=bias).to(dtype), activation, starts(length))
    assert counted == ["forward", "backward"] * 3


@each_dtype
@pytest.mark.parametrize("taps", [3, 4])
def test_long_sequences_are_cut_into_tasks_and_blocks(dtype, taps):
    # Tasks of 455 tokens, blocks of 28 and 8.
    for length, channels in ((1000, 288), (150, 2000)):
        check(
            draw(length, taps, batch=1, channels=channels).to(dtype),
            "silu",
            (0, length // 3, length // 2, length // 2 + 1),
        )


@each_dtype
def test_many_short_sequences_share_a_task(dtype):
    check(draw(3, 4, batch=900).to(dtype), "silu", (2,))


@each_dtype
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_each_segment_has_a_window_of_its_own(segments, dtype):
    case = draw(20, 4, channels=19)
    case = replace(case, before=torch.stack([draw(n, 4, channels=19).before for n in range(len(segments))])).to(dtype)

    def alone(x, weight, bias, before):
        y = torch.zeros_like(x)
        for window, part in zip(before, segments, strict=True):
            inside = reference.short_convolution(x[:, part.at], weight, bias, "silu", part.starts, window)
            y = y.slice_scatter(inside, 1, part.begin, part.end)
        return y

    def together(x, weight, bias, before):
        return causal_convolution(x, weight, bias, activation="silu", segments=segments, before=before)

    want = gradients(case.to(torch.float64), alone)
    for name, got in gradients(case, together).items():
        assert (got.double() - want[name]).norm() <= BOUNDS[dtype] * want[name].norm(), name


@each_dtype
def test_strided_inputs_give_the_same(dtype):
    case = draw(20, 4, batch=3, channels=18).to(dtype)
    want = by_kernel(case, "silu", (7, 8))
    strided = replace(
        case,
        x=torch.cat([case.x, case.x], dim=-1)[..., :18],
        weight=case.weight.t().contiguous().t(),
        bias=torch.stack([case.bias, case.bias], dim=1)[:, 0],
        before=case.before.transpose(1, 2).contiguous().transpose(1, 2),
        dy=case.dy.transpose(0, 2).contiguous().transpose(0, 2),
    )
    leaves = [x.detach().requires_grad_() for x in (strided.x, strided.weight, strided.bias, strided.before)]
    y = causal_convolution(*leaves[:3], activation="silu", segments=[Segment(0, 20, (7, 8))], before=leaves[3][None])
    assert torch.equal(y, want["y"])
    y.backward(strided.dy)
    for name, leaf in zip(("dx", "dweight", "dbias", "dbefore"), leaves, strict=True):
        assert torch.equal(leaf.grad, want[name]), name


def test_results_do_not_depend_on_the_number_of_threads():
    case, before, found = draw(2000, 4, channels=300).to(torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(by_kernel(case, "silu", (700,)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


def test_what_a_token_gives_does_not_depend_on_its_place_in_a_group():
    case = draw(23, 4, channels=20).to(torch.float32)
    want = causal_convolution(case.x, case.weight, case.bias, activation="silu", before=case.before[None])
    for cut in range(4, 9):
        after = case.x[:, cut:].contiguous()
        got = causal_convolution(
            after, case.weight, case.bias, activation="silu", before=case.x[:, cut - 3 : cut].contiguous()[None]
        )
        assert torch.equal(got, want[:, cut:])


@each_activation
@pytest.mark.parametrize("t", [0, 7, 8, 9, 21])
def test_nan_reaches_only_the_tokens_that_see_it_and_the_gradients_of_what_they_see(t, activation):
    case, starts = draw(22, 4, channels=20).to(torch.float32), (8,)
    want = by_kernel(case, activation, starts)
    case.x[:, t] = float("nan")
    got = by_kernel(case, activation, starts)
    stop = min(t + 4, 8 if t < 8 else 22)
    assert got["y"][:, t:stop].isnan().all()
    assert torch.equal(got["y"][:, :t], want["y"][:, :t])
    assert torch.equal(got["y"][:, stop:], want["y"][:, stop:])
    # Only the slope of the activation depends on x.
    reached = slice(max(t - 3, 0 if t < 8 else 8), stop) if activation == "silu" else slice(0, 0)
    assert got["dx"][:, reached].isnan().all()
    assert torch.equal(got["dx"][:, : reached.start], want["dx"][:, : reached.start])
    assert torch.equal(got["dx"][:, reached.stop :], want["dx"][:, reached.stop :])


def test_the_gradient_of_a_weight_is_summed_exactly_over_many_tokens():
    x, dy = torch.rand(1, 50000, 8), torch.ones(1, 50000, 8)
    weight = torch.ones(8, 4, requires_grad=True)
    causal_convolution(x, weight).backward(dy)
    padded = torch.nn.functional.pad(x.double(), (0, 0, 3, 0))
    want = torch.stack([padded[0, i : i + 50000].sum(0) for i in range(4)], dim=1)
    torch.testing.assert_close(weight.grad.double(), want, rtol=2e-7, atol=0)


def test_no_token_and_no_batch():
    for case in (draw(0, 4), draw(6, 4, batch=0)):
        check(case.to(torch.float32), "silu", ())


def test_what_it_does_not_take_runs_in_torch(counted, monkeypatch):
    x, weight = torch.randn(1, 9, 4), torch.ones(4, 3)
    causal_convolution(x.double(), weight)
    causal_convolution(x.half(), weight)
    monkeypatch.setenv(library.SWITCH, "0")
    causal_convolution(x, weight)
    assert counted == []
    monkeypatch.delenv(library.SWITCH)
    causal_convolution(x, weight)
    assert counted == ["forward"]

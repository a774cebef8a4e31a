"""The short causal convolution against the token-by-token reference."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels import convolution, reference
from longctx.kernels.convolution import causal_convolution, final_window, step
from longctx.kernels.linear.recurrence import Segment
from longctx.kernels.native.library import SWITCH

STARTS = {
    "none": lambda length: (),
    "at 0": lambda length: (0,),
    "inside": lambda length: tuple(sorted({length // 3, length // 2, length - 1})),
    "neighbours": lambda length: tuple(x for x in (1, 2, 4, 5, 6, 9) if x < length),
    "every token": lambda length: tuple(range(length)),
}
each_activation = pytest.mark.parametrize("activation", [None, "silu"])
each_width = pytest.mark.parametrize("width", range(1, 9))


@pytest.fixture(params=["1", "0"], ids=["native", "torch"])
def each_implementation(request, monkeypatch):
    """In C++ where that is built, and by torch operators."""
    monkeypatch.setenv(SWITCH, request.param)


@pytest.fixture
def torch_operators(monkeypatch):
    """The implementation of float64, whatever the dtype."""
    monkeypatch.setenv(SWITCH, "0")


@dataclass(frozen=True)
class Case:
    """What goes in, for one segment, and the gradient of what comes out."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    before: torch.Tensor
    dy: torch.Tensor

    @property
    def inputs(self):
        return [x for x in (self.x, self.weight, self.bias, self.before) if x is not None]

    def to(self, dtype):
        return Case(*(None if x is None else x.to(dtype) for x in vars(self).values()))


def draw(length, width, batch=2, channels=5, bias=True):
    generator = torch.Generator().manual_seed(length + width)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, before, dy = (randn(batch, n, channels) for n in (length, width - 1, length))
    return Case(x, randn(channels, width), randn(channels) if bias else None, before, dy)


def gradients(case, function):
    """y, and the gradients of x, weight, bias and before, by autograd through a function of them."""
    leaves = {name: x.clone().requires_grad_() for name, x in vars(case).items() if name != "dy" and x is not None}
    y = function(**{"bias": None} | leaves)
    if y.requires_grad:
        y.backward(case.dy)
    # What nothing reads has no gradient in autograd's eyes.
    zeros = {name: torch.zeros_like(x) for name, x in leaves.items()}
    return {"y": y.detach(), **{f"d{n}": zeros[n] if x.grad is None else x.grad for n, x in leaves.items()}}


def by_reference(case, activation, starts):
    def function(x, weight, bias, before):
        return reference.short_convolution(x, weight, bias, activation, starts, before)

    return gradients(case, function)


def by_kernel(case, activation, starts):
    def function(x, weight, bias, before):
        segments = [Segment(0, x.shape[1], starts)]
        return causal_convolution(x, weight, bias, activation=activation, segments=segments, before=before[None])

    return gradients(case, function)


def check(case, activation, starts):
    got = by_kernel(case, activation, starts)
    for name, want in by_reference(case, activation, starts).items():
        assert got[name].dtype == want.dtype, name
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@each_activation
@each_width
def test_values_and_gradients_equal_the_reference(width, activation, starts):
    for length in (1, 2, 3, 7, 19):
        check(draw(length, width), activation, starts(length))


@pytest.mark.parametrize("elements", [1, 40, 2**18, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 100))])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
def test_tiles_of_any_size_give_the_same(starts, elements, monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", elements)
    for length, width in itertools.product((1, 5, 17), (1, 2, 4, 8)):
        check(draw(length, width, batch=3, bias=width != 2), "silu", starts(length))


def test_a_document_may_start_at_any_place(monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", 30)
    for first, second in itertools.combinations(range(12), 2):
        check(draw(12, 4), None, (first, second))


@each_activation
@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_low_precision_is_computed_in_float32_and_cast_once(dtype, activation, monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", 100)
    low, starts = draw(61, 4).to(dtype), (20, 21, 50)
    got = by_kernel(low, activation, starts)
    for name, want in by_reference(low.to(torch.float64), activation, starts).items():
        assert got[name].dtype == dtype, name
        # One rounding to the mantissa of the dtype, and not two, on what float32 gives.
        bound = want.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 64 * torch.finfo(torch.float32).eps * want.abs().max()
        # Numbers of float16 that are not normal lie further apart.
        assert ((got[name].double() - want).abs() <= bound + torch.finfo(dtype).smallest_normal * 1e-3).all(), name


@pytest.mark.usefixtures("each_implementation")
def test_parameters_in_float32_keep_their_dtype_with_bfloat16_tokens():
    case = draw(30, 4)
    low = replace(case.to(torch.bfloat16), weight=case.weight.float(), bias=case.bias.float())
    got = by_kernel(low, "silu", (7,))
    for name, want in by_reference(low.to(torch.float64), "silu", (7,)).items():
        parameter = name in ("dweight", "dbias")
        assert got[name].dtype == (torch.float32 if parameter else torch.bfloat16), name
        assert (got[name] - want).norm() <= (1e-6 if parameter else 4e-3) * want.norm(), name


@each_activation
def test_gradcheck(activation):
    case = draw(5, 3, channels=2)
    inputs = [x.requires_grad_() for x in case.inputs]

    def plain(x, weight, bias, before):
        return reference.short_convolution(x, weight, bias, activation, (3,), before)

    def fast(x, weight, bias, before):
        segments = [Segment(0, 5, (3,))]
        return causal_convolution(x, weight, bias, activation=activation, segments=segments, before=before[None])

    assert torch.autograd.gradcheck(plain, inputs)
    assert torch.autograd.gradcheck(fast, inputs)


SEGMENTS = {
    "in order": [Segment(0, 9, (4,)), Segment(9, 20, (0, 3))],
    "in any order, one empty, some shorter than the window": [
        Segment(12, 20, (7,)),
        Segment(0, 1),
        Segment(3, 3),
        Segment(3, 12, (1, 2)),
        Segment(1, 3),
    ],
    # The document that begins at 3 ends with its segment: what is before token 4 in memory is not what precedes it.
    "a start just before a segment": [Segment(0, 4, (3,)), Segment(4, 20)],
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("elements", [20, 2**18])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_each_segment_has_a_window_of_its_own(segments, width, elements, monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", elements)
    case = draw(20, width)
    windows = torch.stack([draw(n, width).before for n in range(len(segments))])

    def alone(x, weight, bias, before):
        y = torch.zeros_like(x)
        for window, part in zip(before, segments, strict=True):
            inside = reference.short_convolution(x[:, part.at], weight, bias, "silu", part.starts, window)
            y = y.slice_scatter(inside, 1, part.begin, part.end)
        return y

    def together(x, weight, bias, before):
        return causal_convolution(x, weight, bias, activation="silu", segments=segments, before=before)

    case = replace(case, before=windows)
    want = gradients(case, alone)
    for name, x in gradients(case, together).items():
        torch.testing.assert_close(x, want[name], rtol=1e-12, atol=1e-12)


def test_without_segments_and_window_it_is_one_document():
    case = draw(20, 4)
    got = causal_convolution(case.x, case.weight, case.bias)
    want = torch.nn.functional.conv1d(
        torch.nn.functional.pad(case.x.transpose(1, 2), (3, 0)), case.weight[:, None], case.bias, groups=5
    )
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-12, atol=1e-12)


@each_activation
@pytest.mark.usefixtures("each_implementation")
@pytest.mark.parametrize("t", [0, 19, 20, 40, 59])
def test_changing_a_token_leaves_earlier_outputs_and_other_documents_bitwise_unchanged(t, activation, monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", 2 * 5 * 7)
    case, segments = draw(60, 4).to(torch.float32), [Segment(0, 60, (20,))]
    before = causal_convolution(case.x, case.weight, case.bias, activation=activation, segments=segments)
    case.x[:, t] = float("inf")
    after = causal_convolution(case.x, case.weight, case.bias, activation=activation, segments=segments)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])
    reached = min(t + 4, 20 if t < 20 else 60)
    assert torch.equal(before[:, reached:], after[:, reached:])


def test_a_window_of_another_document_is_not_read():
    case = draw(20, 4)
    segments, nan = [Segment(0, 20, (0,))], torch.full((1, 2, 3, 5), float("nan"), dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (case.x, case.weight, nan)]
    causal_convolution(leaves[0], leaves[1], segments=segments, before=leaves[2]).backward(case.dy)
    assert all(torch.isfinite(x.grad).all() for x in leaves)
    assert torch.equal(leaves[2].grad, torch.zeros_like(nan))


@pytest.mark.parametrize("elements", [20, 2**18])
def test_strided_inputs_give_the_same_and_no_input_is_changed(elements, monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", elements)
    case = draw(20, 4, batch=3)
    want = by_kernel(case, "silu", (7, 8))
    x = torch.cat([case.x, case.x], dim=-1)[..., :5].requires_grad_()
    before = case.before.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weight = case.weight.t().contiguous().t().requires_grad_()
    bias = torch.stack([case.bias, case.bias], dim=1)[:, 0].requires_grad_()
    inputs = (x, weight, bias, before)
    copies = [x.detach().clone() for x in inputs]
    y = causal_convolution(*inputs[:3], activation="silu", segments=[Segment(0, 20, (7, 8))], before=before[None])
    assert y.is_contiguous()
    y.backward(case.dy.transpose(0, 2).contiguous().transpose(0, 2))
    torch.testing.assert_close(y, want["y"], rtol=1e-13, atol=1e-13)
    for name, x, copy in zip(("dx", "dweight", "dbias", "dbefore"), inputs, copies, strict=True):
        torch.testing.assert_close(x.grad, want[name], rtol=1e-13, atol=1e-13)
        assert torch.equal(x, copy)


def test_no_token_and_no_batch():
    for case in (draw(0, 4), draw(6, 4, batch=0)):
        check(case, "silu", ())


class Largest(TorchDispatchMode):
    """The most elements of a float32 tensor that an operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.usefixtures("torch_operators")
@pytest.mark.parametrize("length", [1000, 4000])
def test_bfloat16_tokens_are_never_all_in_float32(length, monkeypatch):
    monkeypatch.setattr(convolution, "TILE_ELEMENTS", 320)
    case = draw(length, 4).to(torch.bfloat16)
    arguments = (case.x, case.weight, case.bias, case.before[None], [0, length], [500], "silu")
    with Largest() as largest:
        convolution._forward(*arguments)
        convolution._backward(case.dy, *arguments)
    # A tile, 64 tokens of 5 channels, and the 3 before them.
    assert largest.elements == (64 + 3) * 5


@each_activation
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_generating_token_by_token_is_the_same(width, bias, activation):
    case = draw(12, width, bias=bias)
    want = reference.short_convolution(case.x, case.weight, case.bias, activation, (), case.before)
    window, outs = case.before, []
    for t in range(12):
        y, window = step(case.x[:, t], window, case.weight, case.bias, activation)
        outs.append(y)
    torch.testing.assert_close(torch.stack(outs, dim=1), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(window, final_window(case.x, width - 1, before=case.before))


def test_a_step_is_computed_in_float32_and_cast_once():
    case = draw(1, 4).to(torch.bfloat16)
    got, window = step(case.x[:, 0], case.before, case.weight, case.bias, "silu")
    wide = case.to(torch.float64)
    want, _ = step(wide.x[:, 0], wide.before, wide.weight, wide.bias, "silu")
    assert got.dtype == window.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= want.abs() * 2.0**-8 * 1.01 + 1e-6).all()


@pytest.mark.parametrize("starts", [(), (0,), (2,), (1, 6), (3, 5)])
@pytest.mark.parametrize("cut", [0, 1, 2, 4, 7])
def test_the_final_window_continues_in_what_follows(starts, cut):
    case = draw(12, 4)
    begun = tuple(start for start in starts if start < cut)
    rest = tuple(start - cut for start in starts if start >= cut)
    window = final_window(case.x[:, :cut], 3, starts=begun, before=case.before)
    assert window.shape == (2, 3, 5)
    got = causal_convolution(
        case.x[:, cut:], case.weight, segments=[Segment(0, 12 - cut, rest)], before=window[None], activation="silu"
    )
    want = reference.short_convolution(case.x, case.weight, None, "silu", starts, case.before)
    torch.testing.assert_close(got, want[:, cut:], rtol=1e-12, atol=1e-12)


def test_the_final_window_holds_no_token_of_another_document_and_no_view_of_the_sequence():
    case = draw(6, 4)
    window = final_window(case.x, 3, starts=(1, 5))
    assert torch.equal(window, torch.cat([torch.zeros_like(case.x[:, :2]), case.x[:, 5:]], dim=1))
    assert window.untyped_storage().nbytes() == window.nbytes
    whole = final_window(case.x, 3)
    assert torch.equal(whole, case.x[:, 3:])
    assert whole.untyped_storage().nbytes() == whole.nbytes


@pytest.mark.parametrize("bias", [True, False])
def test_the_compiler_takes_the_operators_whole(bias):
    case, segments = draw(40, 4, bias=bias), (Segment(20, 40, (3,)), Segment(0, 20))
    windows = torch.stack([case.before, 2 * case.before])

    def loss(x, weight, before, *shift):
        y = causal_convolution(x, weight, *shift, activation="silu", segments=segments, before=before)
        z = causal_convolution(x, weight, *shift)
        return (y * case.dy).sum() + z.square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (case.x, case.weight, windows, *([case.bias] if bias else []))]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_of_the_fake_operators_are_those_of_the_results(dtype, bias):
    case = draw(20, 4, bias=bias).to(dtype)
    low = replace(case, weight=case.weight.float())
    arguments = (low.x, low.weight, low.bias, torch.stack([low.before] * 2), [7, 20, 0, 7], [3, 11], "silu")
    torch.library.opcheck(torch.ops.longctx.causal_convolution.default, arguments)
    torch.library.opcheck(torch.ops.longctx.causal_convolution_grad.default, (low.dy, *arguments))


def test_flops_are_a_product_and_a_sum_for_each_tap():
    case = draw(20, 4)
    with FlopCounterMode(display=False) as counter:
        y = causal_convolution(case.x.requires_grad_(), case.weight, case.bias)
    assert counter.get_total_flops() == 2 * 2 * 20 * 5 * 4
    with FlopCounterMode(display=False) as counter:
        y.backward(case.dy)
    assert counter.get_total_flops() == 2 * 2 * 2 * 20 * 5 * 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"x": torch.randn(8, 5)}, "x has shape [8, 5]: expected [batch, tokens, channels]"),
        ({"x": torch.ones(2, 8, 5, dtype=torch.int64)}, "x is torch.int64: expected one of torch.float64"),
        ({"x": torch.randn(2, 8, 0)}, "x has shape [2, 8, 0]: expected at least one channel"),
        ({"weight": torch.randn(5)}, "weight has shape [5]: expected [channels, taps] with at least one tap"),
        ({"weight": torch.randn(5, 0)}, "weight has shape [5, 0]: expected [channels, taps] with at least one tap"),
        ({"weight": torch.randn(4, 5)}, "weight has shape [4, 5]: expected [channels, taps] = [5, 5]"),
        ({"weight": torch.ones(5, 4, dtype=torch.int32)}, "weight is torch.int32: expected one of torch.float64"),
        ({"weight": torch.randn(5, 4, device="meta")}, "weight is on meta, but x is on cpu: expected the same device"),
        ({"bias": torch.randn(4)}, "bias has shape [4]: expected [channels] = [5]"),
        ({"bias": torch.ones(5, dtype=torch.int32)}, "bias is torch.int32: expected one of torch.float64"),
        ({"activation": "gelu"}, "activation is 'gelu': expected None or 'silu'"),
        (
            {"before": torch.randn(2, 3, 5)},
            "before has shape [2, 3, 5]: expected [segments, batch, taps - 1, channels] = [1, 2, 3, 5]",
        ),
        ({"before": torch.randn(1, 2, 3, 5).double()}, "before is torch.float64, but x is torch.float32: expected the"),
        ({"segments": [Segment(0, 7)]}, "segments have 7 tokens: expected the 8 of x"),
        ({"segments": [Segment(0, 9)]}, "segments have 9 tokens: expected the 8 of x"),
        (
            {"segments": [Segment(4, 8), Segment(0, 5)]},
            "segments have tokens 4 to 8 after the first 5: expected neither overlaps",
        ),
        (
            {"segments": [Segment(5, 8), Segment(0, 4)]},
            "segments have tokens 5 to 8 after the first 4: expected neither overlaps",
        ),
        ({"segments": [Segment(0, 8, (3, 3))]}, "segments have starts [3, 3]: expected ascending offsets below 8"),
        ({"segments": [Segment(0, 8, (-1,))]}, "segments have starts [-1]: expected ascending offsets below 8"),
        ({"segments": [Segment(0, 8, (8,))]}, "segments have starts [8]: expected ascending offsets below 8"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_argument_that_does_not_fit_is_named_with_its_value_and_what_was_expected(wrong, words):
    good = {"x": torch.randn(2, 8, 5), "weight": torch.randn(5, 4)}
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        causal_convolution(**good | wrong)


def test_wrong_arguments_of_generation_are_refused():
    x, window, weight = torch.randn(2, 5), torch.randn(2, 3, 5), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"x has shape \[2, 1, 5\]: expected \[batch, channels\]"):
        step(x[:, None], window, weight)
    with pytest.raises(ValueError, match=r"window has shape \[2, 2, 5\]: expected .* = \[2, 3, 5\]"):
        step(x, window[:, 1:], weight)
    with pytest.raises(ValueError, match=r"x has shape \[2, 5\]: expected \[batch, tokens, channels\]"):
        final_window(x, 3)
    with pytest.raises(ValueError, match="count is -1: expected at least 0 tokens"):
        final_window(window, -1)
    with pytest.raises(ValueError, match=r"before has shape \[2, 2, 5\]: expected .* = \[2, 4, 5\]"):
        final_window(window, 4, before=window[:, 1:])
    with pytest.raises(ValueError, match=r"segments have starts \[3\]: expected ascending offsets below 3"):
        final_window(window, 4, starts=(3,))

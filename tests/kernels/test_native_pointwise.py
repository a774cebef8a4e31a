"""RMSNorm and SwiGLU in C++ against their equations in float64."""

import pytest
import torch

from longctx.kernels import native_pointwise, pointwise
from longctx.kernels.native import library
from tests.kernels.test_pointwise import FUNCTIONS, draw

pytestmark = pytest.mark.skipif(
    not library.is_enabled() or library.load(native_pointwise.FAMILY) is None, reason="needs a C++ compiler"
)
each_function = pytest.mark.parametrize(("fast", "plain", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def shaped(shapes, rows, width):
    """The shapes of a function for other rows and another width, twice that of SwiGLU's result."""
    last = 2 * width if len(shapes) == 1 else width
    return [(*rows, last) if len(shape) > 1 else (last,) for shape in shapes]


def both(function, inputs, do):
    """Values and gradients of copies of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


@pytest.fixture
def counted(monkeypatch):
    """The native operators that run."""
    calls, run = [], native_pointwise._run

    def counting(name, *arguments, **named):
        calls.append(name)
        run(name, *arguments, **named)

    monkeypatch.setattr(native_pointwise, "_run", counting)
    return calls


@each_function
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("rows", "width"), [((2, 37), 6), ((5,), 16), ((3, 1), 23), ((700,), 100), ((1,), 2048)], ids=str
)
def test_values_and_gradients_equal_the_reference(fast, plain, shapes, dtype, rows, width, counted):
    inputs = [x.to(dtype) for x in draw(shaped(shapes, rows, width))]
    do = torch.randn(*rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = both(plain, [x.double() for x in inputs], do.double())
    got = both(fast, inputs, do)
    assert len(counted) == 2
    for found, exact in zip(got, want, strict=True):
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= BOUNDS[dtype] * exact.norm()


@each_function
def test_large_and_small_values(fast, plain, shapes):
    sizes = torch.tensor([1e-30, 1e-8, 1.0, 80.0, 1e4])[:, None]
    inputs = [(x * sizes if x.dim() > 1 else x).float() for x in draw(shaped(shapes, (5,), 24))]
    got, want = fast(*inputs), plain(*(x.double() for x in inputs))
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-33)  # exp is 0 below 1e-38


@each_function
def test_results_do_not_depend_on_the_number_of_threads(fast, plain, shapes):
    inputs = [x.float() for x in draw(shaped(shapes, (3000,), 96))]
    do, before, found = torch.randn(3000, 96), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both(fast, inputs, do))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@each_function
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(fast, plain, shapes, value):
    inputs = [x.float() for x in draw(shaped(shapes, (9,), 20))]
    want = fast(*inputs)
    inputs[0][4, 3] = value
    got = fast(*inputs)
    assert not got[4].isfinite().all()
    assert torch.equal(got[:4], want[:4])
    assert torch.equal(got[5:], want[5:])


def test_the_gradient_of_a_weight_is_summed_in_float32_over_many_rows():
    x, do = torch.randn(20000, 8).bfloat16(), torch.ones(20000, 8, dtype=torch.bfloat16)
    weight = torch.ones(8, dtype=torch.float32, requires_grad=True)
    pointwise.rms_norm(x.abs(), weight, 1e-5).backward(do)
    wide = x.abs().double()
    want = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).sum(0)
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-5, atol=0)


def test_what_it_does_not_take_runs_in_torch(counted, monkeypatch):
    x, weight = torch.randn(3, 4), torch.ones(4)
    pointwise.rms_norm(x.double(), weight.double(), 1e-5)
    pointwise.gated_rms_norm(x, weight, x.bfloat16(), 1e-5, "silu")
    torch.compile(pointwise.swiglu, backend="eager", fullgraph=False)(x)
    monkeypatch.setenv(library.SWITCH, "0")
    pointwise.rms_norm(x, weight, 1e-5)
    assert counted == []
    monkeypatch.delenv(library.SWITCH)
    pointwise.rms_norm(x, weight, 1e-5)
    assert counted == ["norm"]

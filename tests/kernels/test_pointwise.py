"""Normalisation and SwiGLU, in tiles, against their equations."""

import pytest
import torch

from longctx.kernels import pointwise, reference

FUNCTIONS = {
    "norm, weight": (
        lambda x, s: pointwise.rms_norm(x, s, 1e-5),
        lambda x, s: reference.rms_norm(x, s, 1e-5),
        [(2, 37, 6), (6,)],
    ),
    "norm, gate": (
        lambda x, s: pointwise.rms_norm(x, s, 1e-5),
        lambda x, s: reference.rms_norm(x, s, 1e-5),
        [(2, 37, 6), (2, 37, 6)],
    ),
    **{
        f"norm, weight, {activation} of a gate": (
            lambda x, s, g, activation=activation: pointwise.gated_rms_norm(x, s, g, 1e-5, activation),
            lambda x, s, g, activation=activation: reference.gated_rms_norm(x, s, g, 1e-5, activation),
            [(2, 37, 6), (6,), (2, 37, 6)],
        )
        for activation in ("silu", "sigmoid")
    },
    "swiglu": (pointwise.swiglu, reference.swiglu, [(2, 37, 10)]),
}


def draw(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("elements", [1, 50, 2**18])
@pytest.mark.parametrize(("fast", "plain", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_values_and_gradients_equal_the_reference(fast, plain, shapes, elements, monkeypatch):
    monkeypatch.setattr(pointwise, "TILE_ELEMENTS", elements)
    want_inputs = [x.requires_grad_() for x in draw(shapes)]
    got_inputs = [x.requires_grad_() for x in draw(shapes)]
    want, got = plain(*want_inputs), fast(*got_inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    do = torch.randn_like(want)
    want.backward(do)
    got.backward(do)
    for a, b in zip(got_inputs, want_inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("fast", "plain", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_gradcheck(fast, plain, shapes):
    inputs = [x[..., :3, :].requires_grad_() if x.dim() > 1 else x.requires_grad_() for x in draw(shapes)]
    assert torch.autograd.gradcheck(fast, inputs)


@pytest.mark.parametrize(("fast", "plain", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_bfloat16_is_computed_in_float32_and_cast_once(fast, plain, shapes):
    low = [x.bfloat16() for x in draw(shapes, torch.float32)]
    exact = plain(*(x.double() for x in low))
    got = fast(*low)
    assert got.dtype == torch.bfloat16
    # One rounding to 8 bits of mantissa, and not two.
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.01 + 1e-30).all()


def test_strided_inputs():
    x, scale = draw([(2, 20, 12), (6,)])
    wide = x[..., ::2]
    torch.testing.assert_close(pointwise.rms_norm(wide, scale, 1e-5), reference.rms_norm(wide, scale, 1e-5))
    torch.testing.assert_close(pointwise.swiglu(wide), reference.swiglu(wide))
    leaf = x.clone().requires_grad_()
    pointwise.swiglu(leaf.transpose(0, 1)[..., ::2]).sum().backward()
    other = x.clone().requires_grad_()
    reference.swiglu(other.transpose(0, 1)[..., ::2]).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_no_token_at_all():
    assert pointwise.rms_norm(torch.zeros(0, 4), torch.ones(4), 1e-5).shape == (0, 4)
    assert pointwise.swiglu(torch.zeros(0, 4)).shape == (0, 2)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"scale has shape \[3\]: expected that of x"):
        pointwise.rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-5)
    with pytest.raises(
        ValueError, match=r"gate has shape \[2, 3\] and scale \[4\]: expected \[2, 4\], that of x, and \[4\]"
    ):
        pointwise.gated_rms_norm(torch.zeros(2, 4), torch.ones(4), torch.zeros(2, 3), 1e-5, "silu")
    with pytest.raises(ValueError, match="5 has to be even"):
        pointwise.swiglu(torch.zeros(2, 5))

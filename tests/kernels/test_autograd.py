"""Autograd decorators of custom functions: autocast is off inside, and a second derivative raises."""

import pytest
import torch

from longctx.kernels.autograd import exact_backward, exact_forward

seen = []


def product(x, y):
    """A matrix product, with the dtype that it was computed in on record."""
    out = x @ y
    seen.append((out.dtype, torch.is_autocast_enabled("cpu")))
    return out


class Product(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx, x, y):
        """Multiply."""
        ctx.save_for_backward(x, y)
        return product(x, y)

    @staticmethod
    @exact_backward
    def backward(ctx, d):
        x, y = ctx.saved_tensors
        return product(d, y.T), product(x.T, d)


@pytest.fixture(autouse=True)
def _nothing_seen():
    seen.clear()


def draw():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator).requires_grad_() for _ in range(2)]


def test_forward_and_backward_run_without_autocast_and_leave_it_on():
    x, y = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ y).dtype == torch.bfloat16
        out = Product.apply(x, y)
        out.sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(torch.float32, False)] * 3
    assert torch.equal(out, x @ y)
    assert torch.equal(x.grad, torch.ones(4, 4) @ y.T)
    assert torch.equal(y.grad, x.T @ torch.ones(4, 4))


def test_without_autocast_nothing_changes():
    x, y = draw()
    Product.apply(x, y).sum().backward()
    assert seen == [(torch.float32, False)] * 3
    assert torch.equal(x.grad, torch.ones(4, 4) @ y.T)


def test_arguments_may_be_no_tensors():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact_forward(lambda ctx, *a: (a, torch.is_autocast_enabled("cpu")))(None, 2, None) == ((2, None), False)


def test_differentiating_the_backward_pass_raises():
    x, y = draw()
    (dx,) = torch.autograd.grad(Product.apply(x, y).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_the_decorated_function_keeps_its_name_and_docstring():
    assert (Product.forward.__name__, Product.forward.__doc__) == ("forward", "Multiply.")

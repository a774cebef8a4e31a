"""Autograd functions over ranks: no autocast inside, the layer of the forward pass, and no double backward."""

import pytest
import torch

from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.traffic import count_traffic, current_layer, layer, record_call


class Square(torch.autograd.Function):
    """x @ x, which counts a collective in both passes and notes what is set while it runs."""

    notes: list

    @staticmethod
    @rank_forward
    def forward(ctx, x):
        """Multiply."""
        record_call("all_gather", 3)
        y = x @ x
        Square.notes.append((current_layer(), torch.is_autocast_enabled("cpu"), y.dtype))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @rank_backward
    def backward(ctx, grad):
        record_call("reduce_scatter", 5)
        (x,) = ctx.saved_tensors
        dx = grad @ x.T + x.T @ grad
        Square.notes.append((current_layer(), torch.is_autocast_enabled("cpu"), dx.dtype))
        return dx


@pytest.fixture
def x():
    Square.notes = []
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_the_backward_pass_counts_for_the_layer_of_the_forward_pass(x):
    with count_traffic() as traffic:
        with layer("first"):
            y = Square.apply(x)
        with layer("second"):
            z = Square.apply(y)
        with layer("third"):
            z.sum().backward()
            assert current_layer() == "third"
    assert [note[0] for note in Square.notes] == ["first", "second", "second", "first"]
    each = {"all_gather": 3, "reduce_scatter": 5}
    assert {name: dict(found.bytes) for name, found in traffic.layers.items()} == {"first": each, "second": each}


def test_outside_of_any_layer_nothing_is_attributed_to_one(x):
    with count_traffic() as traffic:
        y = Square.apply(x)
        with layer("loss"):
            y.sum().backward()
    assert [note[0] for note in Square.notes] == ["", ""]
    assert not traffic.layers
    assert traffic.received == 8


def test_autocast_is_off_in_both_passes(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        y = Square.apply(x)
        y.sum().backward()
        assert torch.is_autocast_enabled("cpu")
    assert [note[1:] for note in Square.notes] == [(False, torch.float32)] * 2
    assert torch.equal(y, x @ x)


def test_the_gradient_is_that_of_the_function(x):
    Square.apply(x).sum().backward()
    want = torch.autograd.grad((x @ x).sum(), x)[0]
    torch.testing.assert_close(x.grad, want)


def test_a_second_derivative_is_refused(x):
    (grad,) = torch.autograd.grad(Square.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

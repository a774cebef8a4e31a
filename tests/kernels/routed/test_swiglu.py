"""The feed-forward in tiles against the whole one, and that of experts against each alone."""

import pytest
import torch

from longctx.kernels import reference
from longctx.kernels.routed.swiglu import grouped_swiglu, tiled_swiglu


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 19, 5), (12, 5), (5, 6)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("tile", [1, 7, 38, 1000])
def test_values_and_gradients_equal_the_whole(tile):
    whole, tiled = ([x.requires_grad_() for x in draw()] for _ in range(2))
    want = reference.swiglu(whole[0] @ whole[1].T) @ whole[2].T
    got = tiled_swiglu(*tiled, tile)
    do = torch.randn_like(want)
    want.backward(do)
    got.backward(do)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(tiled, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


def test_weights_gradients_in_bfloat16_are_summed_in_float32():
    low = [x.bfloat16().requires_grad_() for x in draw(torch.float32)]
    do = torch.ones(2, 19, 5, dtype=torch.bfloat16)
    whole = torch.autograd.grad(tiled_swiglu(*low, 38), low, do)
    tiles = torch.autograd.grad(tiled_swiglu(*low, 1), low, do)
    for a, b in zip(tiles[1:], whole[1:], strict=True):
        assert ((a - b).norm() / b.norm()).item() < 4e-3


def test_strided_inputs():
    x, gate_up, down = draw()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    x.requires_grad_()
    tiled_swiglu(strided, gate_up, down, 4).sum().backward()
    tiled_swiglu(x, gate_up, down, 4).sum().backward()
    torch.testing.assert_close(strided.grad, x.grad)


COUNTS = {
    "one without": (4, 0, 10, 5),
    "all to one": (0, 19, 0, 0),
    "one row": (0, 0, 1, 0),
    "none": (0, 0, 0, 0),
}


def experts(counts, dtype, widths=(8, 12)):
    generator = torch.Generator().manual_seed(1)
    dim, hidden = widths
    shapes = [(sum(counts), dim), (len(counts), 2 * hidden, dim), (len(counts), dim, hidden)]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    x, gate_up, down = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return x.requires_grad_(), ends, gate_up.requires_grad_(), down.requires_grad_()


def each_alone(x, counts, gate_up, down):
    parts = zip(x.split(list(counts)), gate_up, down, strict=True)
    return torch.cat([reference.swiglu(rows @ a.T) @ b.T for rows, a, b in parts])


@pytest.mark.parametrize("widths", [(8, 12), (5, 3)], ids=["aligned", "odd"])
@pytest.mark.parametrize("tile", [None, 1, 7, 1000])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_experts_equal_each_one_alone(counts, tile, widths, dtype, bound):
    x, ends, gate_up, down = experts(counts, dtype, widths)
    exact = [t.detach().double().requires_grad_() for t in (x, gate_up, down)]
    want = each_alone(exact[0], counts, *exact[1:])
    do = torch.randn(want.shape, dtype=torch.float64)
    want.backward(do)
    got = grouped_swiglu(x, ends, gate_up, down, tile)
    got.backward(do.to(dtype))
    assert (got.double() - want).norm() <= bound * want.norm()
    for a, b in zip((x, gate_up, down), exact, strict=True):
        assert a.grad.shape == b.shape
        assert (a.grad.double() - b.grad).norm() <= bound * b.grad.norm()


def test_experts_in_bfloat16_stay_near_and_their_gradients_are_summed_in_float32():
    x, ends, gate_up, down = experts((4, 0, 10, 5), torch.bfloat16)
    whole = torch.autograd.grad(grouped_swiglu(x, ends, gate_up, down), (gate_up, down), torch.ones_like(x))
    tiles = torch.autograd.grad(grouped_swiglu(x, ends, gate_up, down, 1), (gate_up, down), torch.ones_like(x))
    want = each_alone(x.double(), (4, 0, 10, 5), gate_up.double(), down.double())
    assert ((grouped_swiglu(x, ends, gate_up, down).double() - want).norm() / want.norm()).item() < 1e-2
    for a, b in zip(tiles, whole, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 5e-3
        assert not a[1].any()


def test_the_gradient_that_comes_in_may_be_strided():
    x, ends, gate_up, down = experts((4, 0, 10, 5), torch.float32)
    y = grouped_swiglu(x, ends, gate_up, down)
    (want,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (got,) = torch.autograd.grad(y, x, torch.ones(()).expand(y.shape))
    torch.testing.assert_close(got, want)

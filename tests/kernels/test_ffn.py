"""The feed-forward in tiles against the whole one."""

import pytest
import torch

from longctx.kernels import reference
from longctx.kernels.ffn import tiled_swiglu


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

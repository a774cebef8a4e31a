"""Parts of the chunkwise kernels, alone."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import language as tl

from longctx.kernels.linear.triton_chunk import token_at

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@triton.jit
def offset_kernel(tensor, strides, out, batch, token, head):
    at = token_at(tensor, strides, batch, token, head)
    tl.store(out, at.to(tl.int64) - tensor.to(tl.int64))


@pytest.mark.parametrize("place", [(3, 0, 0), (0, 2**20 - 1, 0), (0, 0, 40), (1, 5, 63)], ids=str)
def test_offsets_beyond_an_int32(place):
    # [B, H, T, D] in memory, of which only the addresses matter: 64 heads of a million tokens.
    tensor, out = torch.zeros(1, dtype=torch.uint8, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    strides = (64 * 2**20 * 128, 128, 2**20 * 128)
    offset_kernel[(1,)](tensor, strides, out, *place)
    assert out.item() == sum(x * stride for x, stride in zip(place, strides, strict=True))

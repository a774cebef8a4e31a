"""Numbers of chance that depend on a token's place and not on which rank it lies, or how often they are asked for."""

import torch
from torch import Tensor

from longctx.parallel.layout import Layout

# The constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
_BLOCK = 2**20


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, of unsigned 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """The output function of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def around_one(layout: Layout, width: float, shape: torch.Size, layer: int, device: torch.device) -> Tensor:
    """Uniform in `[1 - width, 1 + width)`, float32, of `shape` `[B, T_local, D]`.

    They depend on the number of the sequence, the layer, the row, the token's place in the sequence and the channel.
    """
    batch, length, channels = shape
    key = torch.tensor([layout.sequence, layer], dtype=torch.int64, device=device)
    key = _mixed(_mixed(key[0] * _STEP) + key[1] * _STEP)
    row = torch.arange(batch, device=device)[:, None]
    place = _mixed(_mixed(key + row * _STEP) + layout.tokens.to(device) * _STEP)
    channel = torch.arange(channels, device=device)
    out = torch.empty(batch, length, channels, device=device)
    step = max(1, _BLOCK // max(1, batch * channels))
    for begin in range(0, length, step):
        bits = _shifted(_mixed(place[:, begin : begin + step, None] + (channel + 1) * _STEP), 40)
        out[:, begin : begin + step] = bits.to(torch.float32) * (2 * width * 2.0**-24) + (1 - width)
    return out

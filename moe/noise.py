"""Counter-based random numbers keyed by token position, so that results do not depend on sharding or recomputation."""

import torch
from torch import Tensor

from longctx.parallel.layout import Layout

# The constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
_BLOCK = 2**20


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Return x >> bits, with x as unsigned 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the output function of splitmix64: every bit of the result depends on every bit of x."""
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def jitter_factors(layout: Layout, width: float, shape: torch.Size, layer: int, device: torch.device) -> Tensor:
    """Return factors uniform in `[1 - width, 1 + width)`, float32, of `shape` `[B, T_local, D]`.

    Keyed by the number of the sequence, the layer, the row, the token's position in the sequence and the channel.
    """
    batch, length, channels = shape
    sequence, number = (torch.full((), key, dtype=torch.int64, device=device) for key in (layout.sequence, layer))
    key = _mix(_mix(sequence * _STEP) + number * _STEP)
    row = torch.arange(batch, device=device)[:, None]
    position = _mix(_mix(key + row * _STEP) + layout.on_device("tokens", device) * _STEP)
    channel = torch.arange(channels, device=device)
    out = torch.empty(batch, length, channels, device=device)
    step = max(1, _BLOCK // max(1, batch * channels))
    for begin in range(0, length, step):
        bits = _shift_right(_mix(position[:, begin : begin + step, None] + (channel + 1) * _STEP), 40)
        out[:, begin : begin + step] = bits.to(torch.float32) * (2 * width * 2.0**-24) + (1 - width)
    return out

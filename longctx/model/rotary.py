"""Rotary position embedding (Su et al. 2021), by positions that the layout gives."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, dim / 2]` in float64 for positions `[T]`.

    Angles are made in float64: at position 2^20 a float32 angle would be off by 0.06 rad.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.to(torch.float64)[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D/2) of `x [B, T, H, D]` by the table's angles, in float32 (float64 stays).

    Raises ValueError where the table is not for T positions.
    """
    if x.shape[1] != table[0].shape[0]:
        raise ValueError(f"x has {x.shape[1]} tokens: expected the {table[0].shape[0]} that the layout gives this rank")
    cos, sin = (part[None, :, None, :] for part in table)
    return _turned(x, cos, sin)


def rotate_rows(x: Tensor, rows: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The same for `x [..., D]`, each of which is of the position in the row of the table that `rows [...]` names."""
    flat = rows.clamp_min(0).flatten()
    cos, sin = (part.index_select(0, flat).view(*rows.shape, part.shape[1]) for part in table)
    return _turned(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    left, right = x.to(wide).chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)

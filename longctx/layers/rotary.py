"""Rotary position embedding (Su et al. 2021), by positions that the layout gives."""

import math

import torch
from pydantic import Field
from torch import Tensor

from longctx.config import Config, Integer


class RopeScaling(Config):
    """`[model.softmax.rope_scaling]`: slower rotary positions, as in Llama 3.1: waves that are long beside the
    sequences of earlier training become `factor` times as long, short ones stay."""

    factor: float = Field(ge=1)
    """What the longest waves are stretched by."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Waves that fit less often than this into `original_max_position_embeddings` are stretched by all of `factor`."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Waves that fit more often than this stay as they are; between the two the share falls linearly."""
    original_max_position_embeddings: Integer = Field(gt=0)
    """Tokens of the sequences of earlier training."""

    def problems(self) -> list[str]:
        """What does not fit together, in words, each beginning with the key it is about."""
        if self.low_freq_factor < self.high_freq_factor:
            return []
        return [f"high_freq_factor: {self.high_freq_factor} has to be above low_freq_factor {self.low_freq_factor}"]

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Of frequencies, in radians per token, those that are turned by."""
        times = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((times - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * ((1 - kept) / self.factor + kept)


def rotary_table(
    positions: Tensor, dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, dim / 2]` in float64 for positions `[T]`.

    Angles are made in float64: at position 2^20 a float32 angle would be off by 0.06 rad.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)
    angles = positions.to(torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D/2) of `x [B, T, H, D]` by the table's angles, in float32 (float64 stays).

    Of a table for fewer channels D is their number, and they are the first ones; the rest stays. Raises ValueError
    where the table is not for T positions.
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
    turned = 2 * cos.shape[-1]
    left, right = x[..., :turned].to(wide).chunk(2, dim=-1)
    parts = [(left * cos - right * sin).to(x.dtype), (right * cos + left * sin).to(x.dtype)]
    return torch.cat(parts if turned == x.shape[-1] else [*parts, x[..., turned:]], dim=-1)

"""Rotary position embedding (RoPE; Su et al. 2021) at the positions of a layout, with Llama 3.1's frequency scaling."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from longctx.config import Config, Integer
from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.fusion import fused
from longctx.parallel.layout import Layout


class RopeScaling(Config):
    """`[model.softmax.rope_scaling]`: scaling of rotary frequencies for long context, as in Llama 3.1: low frequencies
    are divided by `factor`, high frequencies are kept."""

    factor: float = Field(ge=1)
    """Divisor of the low frequencies."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Frequencies with fewer periods than this in `original_max_position_embeddings` are divided by `factor`."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Frequencies with more periods than this are kept; in between, the two are interpolated linearly."""
    original_max_position_embeddings: Integer = Field(gt=0)
    """Sequence length of the original training."""

    def problems(self) -> list[str]:
        """Return the problems of the configuration, each a message that begins with its key."""
        if self.low_freq_factor < self.high_freq_factor:
            return []
        return [f"high_freq_factor: {self.high_freq_factor} has to be above low_freq_factor {self.low_freq_factor}"]

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies (radians per token)."""
        periods = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((periods - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * ((1 - kept) / self.factor + kept)


Table = tuple[Tensor, Tensor]
"""Cosines and sines, `[T, dim / 2]` each."""


def layout_table(layout: Layout, x: Tensor, dim: int, theta: float, scaling: RopeScaling | None = None) -> Table:
    """Return the table of a layout's positions for x, in its accumulation dtype: one for all layers of a batch."""
    wide = accumulation_dtype(x.dtype)

    def compute() -> Table:
        cos, sin = rotary_table(layout.on_device("positions", x.device), dim, theta, scaling)
        return cos.to(wide), sin.to(wide)

    table: Table = layout.cached(("rotary", dim, theta, scaling, wide, x.device), compute)
    return table


def rotary_table(positions: Tensor, dim: int, theta: float, scaling: RopeScaling | None = None) -> Table:
    """Compute the cosines and sines for positions `[T]`: `[T, dim / 2]` each, float64.

    Angles are in float64: at position 2^20 a float32 angle would be off by 0.06 rad.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)
    angles = positions.to(torch.float64)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of `x [B, T, H, D]` by the table's angles, in float32 (float64 if x is).

    With a table for fewer channels (partial rotary), D is their number: the first ones are rotated, the others kept.
    Raises ValueError if the table does not have T positions.
    """
    if x.shape[1] != table[0].shape[0]:
        raise ValueError(f"x has {x.shape[1]} tokens: expected the {table[0].shape[0]} of the layout on this rank")
    cos, sin = (part[None, :, None, :] for part in table)
    return _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]


def rotate_rows(x: Tensor, rows: Tensor, table: Table) -> Tensor:
    """Rotate vectors `x [..., D]`, each at the position of the table's row `rows [...]`; -1 uses row 0."""
    flat = rows.clamp_min(0).flatten()
    cos, sin = (part.index_select(0, flat).view(*rows.shape, part.shape[1]) for part in table)
    return _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]


class _Rotation(torch.autograd.Function):
    """The transpose of a rotation is the rotation by the opposite angle."""

    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


@fused
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide), sin.to(wide)
    dim = 2 * cos.shape[-1]
    left, right = x[..., :dim].to(wide).chunk(2, dim=-1)
    parts = [(left * cos - right * sin).to(x.dtype), (right * cos + left * sin).to(x.dtype)]
    return torch.cat(parts if dim == x.shape[-1] else [*parts, x[..., dim:]], dim=-1)

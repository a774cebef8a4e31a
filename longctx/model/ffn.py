"""Feed-forward layers: the interface, and the dense SwiGLU."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from longctx.config import Config, Integer
from longctx.kernels.pointwise import swiglu
from longctx.kernels.routed.swiglu import tiled_swiglu
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache
from longctx.layers.output import Attend, Output
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.layout import Layout


class FeedForward(nn.Module, ABC):
    """A feed-forward layer: dense, or a mixture of experts."""

    attention_channels = 0
    """Channels of the scores that its router averages with the mixer's attention; 0 if it does not use it."""

    tile: int | None = None
    """Tokens per tile of hidden activations, which the backward pass recomputes; None keeps those of all tokens."""

    output_read = True
    """Whether somebody reads the layer's output: not while the block that ends with it is recomputed for its backward
    pass."""

    @abstractmethod
    def forward(
        self, x: Tensor, layout: Layout, attend: Attend | None = None, cache: Cache | None = None
    ) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`; the shape stays.

        `attend` is the attention of the block's mixer, required if `attention_channels` > 0. `cache` is the block's, as
        in `longctx.mixers.Mixer.forward`.
        """

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token, without those that depend on other tokens."""

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of one forward pass over this rank's tokens, without the mixer's attention."""
        return layout.local_length * self.flops_per_token

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> ScheduleChoice | None:
        """Describe the schedule of the router's own attention, as `longctx.mixers.Mixer.describe_schedule` does."""
        del layout, dtype
        return None


class FeedForwardConfig(Config, ABC):
    """Configuration of a feed-forward, a recipe's table `[model.<name>]`."""

    name: ClassVar[str]

    @property
    def needs_attention(self) -> bool:
        """Whether its router uses the attention of the block's mixer."""
        return False

    @classmethod
    def needs_table(cls) -> bool:
        """Whether the recipe has to have its table: some key has no default."""
        return any(field.is_required() for field in cls.model_fields.values())

    @abstractmethod
    def shrunk(self) -> Self:
        """Return a narrow version of the layer, for cheap verification of a model."""

    @abstractmethod
    def build(self, dim: int, layer: int, depth: int) -> FeedForward:
        """Build the feed-forward of layer `layer` (from 0) of `depth`, for width `dim`."""

    def resolved(self, dim: int) -> Self:
        """Return the configuration with derived keys filled in, as `longctx.mixers.MixerConfig.resolved` does."""
        del dim
        return self

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]] | None:
        """Return the schedules of the router's own attention, as `longctx.mixers.MixerConfig.available_schedules` does;
        None if it has none."""
        del size, ulysses
        return None

    def problems(self) -> list[str]:
        """Return the problems of the configuration, each a message that begins with its key."""
        return []


class SwigluConfig(FeedForwardConfig):
    """`[model.swiglu]`: the dense gated feed-forward. The table is optional."""

    name: ClassVar[str] = "swiglu"

    hidden: Integer | None = Field(default=None, gt=0)
    """Hidden width. Default: `8/3 dim`, rounded up to a multiple of 64."""

    def shrunk(self) -> "SwigluConfig":
        return SwigluConfig(hidden=48)

    def width(self, dim: int) -> int:
        """Return the hidden width for a model of width `dim`."""
        return self.hidden or -(-8 * dim // (3 * 64)) * 64

    def resolved(self, dim: int) -> "SwigluConfig":
        return self.model_copy(update={"hidden": self.width(dim)})

    def build(self, dim: int, layer: int, depth: int) -> "Swiglu":
        return Swiglu(dim, self.width(dim), depth)


class Swiglu(FeedForward):
    """SwiGLU, `(SiLU(x W_gate) * (x W_up)) W_down` (Shazeer 2020), with gate and up in one matrix."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim, scale=(2 * depth) ** -0.5)

    def forward(self, x: Tensor, layout: Layout, attend: Attend | None = None, cache: Cache | None = None) -> Tensor:
        """Compute the layer for x `[B, T_local, D]`, token by token; the shape stays."""
        del layout, attend, cache
        if self.tile is not None:
            gate_up, down = self.gate_up.weight, self.down.weight
            return tiled_swiglu(x, gate_up, down, self.tile, computed=self.output_read)
        return self.down(swiglu(self.gate_up(x)))

    @property
    def flops_per_token(self) -> int:
        return self.gate_up.flops_per_token + self.down.flops_per_token

"""What a feed-forward is to a model, and the dense one."""

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
from longctx.parallel.layout import Layout


class FeedForward(nn.Module, ABC):
    """A map of each token by itself, or of each token and what its router chose for it."""

    borrowed = 0
    """Channels for which its router reads the attention of the block's mixer; 0: it does not."""

    tile: int | None = None
    """Tokens whose hidden activations exist at one time, made again in the backward pass; None: all, kept."""

    @abstractmethod
    def forward(
        self, x: Tensor, layout: Layout, attend: Attend | None = None, cache: Cache | None = None
    ) -> Tensor | Output:
        """`[B, T_local, D]` to the same.

        `attend`: the attention of the block's mixer, where `borrowed` asks for it. `cache`: the block's, as in
        `longctx.mixers.Mixer.forward`.
        """

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token by itself."""

    def flops(self, layout: Layout) -> int:
        """Those of one forward pass over this rank's tokens, what goes through the mixer's attention not counted."""
        return layout.local_length * self.flops_per_token

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """As in `longctx.mixers.Mixer.describe_schedule`, of a router that reads other tokens by attention of its
        own."""
        del layout, dtype
        return None


class FeedForwardConfig(Config, ABC):
    """A feed-forward's table in a recipe, `[model.<name>]`."""

    name: ClassVar[str]

    @property
    def borrows(self) -> bool:
        """Whether its router reads the attention of the block's mixer."""
        return False

    @classmethod
    def needs_table(cls) -> bool:
        """Whether some key has no default."""
        return any(field.is_required() for field in cls.model_fields.values())

    @abstractmethod
    def shrunk(self) -> Self:
        """The same kind of layer, narrow, to verify a model with at little cost."""

    @abstractmethod
    def build(self, dim: int, layer: int, depth: int) -> FeedForward:
        """The feed-forward of layer `layer` (from 0) of `depth`, for width `dim`."""

    def resolved(self, dim: int) -> Self:
        """As in `longctx.mixers.MixerConfig.resolved`."""
        del dim
        return self

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]] | None:
        """As in `longctx.mixers.MixerConfig.available_schedules`; None where it reads no other token by itself."""
        del size, ulysses
        return None

    def problems(self) -> list[str]:
        """What does not fit together, in words, each beginning with the key it is about."""
        return []


class SwigluConfig(FeedForwardConfig):
    """`[model.swiglu]`: the gated feed-forward; may be absent."""

    name: ClassVar[str] = "swiglu"

    hidden: Integer | None = Field(default=None, gt=0)
    """Hidden width; where absent `8/3 dim`, rounded up to a multiple of 64."""

    def shrunk(self) -> "SwigluConfig":
        return SwigluConfig(hidden=48)

    def width(self, dim: int) -> int:
        """The hidden width, for width `dim`."""
        return self.hidden or -(-8 * dim // (3 * 64)) * 64

    def resolved(self, dim: int) -> "SwigluConfig":
        return self.model_copy(update={"hidden": self.width(dim)})

    def build(self, dim: int, layer: int, depth: int) -> "Swiglu":
        return Swiglu(dim, self.width(dim), depth)


class Swiglu(FeedForward):
    """`(SiLU(x W_gate) * (x W_up)) W_down` (Shazeer 2020), gate and up in one matrix."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim, scale=(2 * depth) ** -0.5)

    def forward(self, x: Tensor, layout: Layout, attend: Attend | None = None, cache: Cache | None = None) -> Tensor:
        """`[B, T_local, D]` to the same, each token by itself."""
        del layout, attend, cache
        if self.tile is not None:
            return tiled_swiglu(x, self.gate_up.weight, self.down.weight, self.tile)
        return self.down(swiglu(self.gate_up(x)))

    @property
    def flops_per_token(self) -> int:
        return self.gate_up.flops_per_token + self.down.flops_per_token

"""What a feed-forward is to a model, and the dense one."""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from pydantic import Field
from torch import Tensor, nn

from longctx.config import Config, Integer
from longctx.kernels.ffn import tiled_swiglu
from longctx.kernels.pointwise import swiglu
from longctx.model.layers import Linear, Output
from longctx.parallel.layout import Layout


class FeedForward(nn.Module, ABC):
    """A map of each token by itself, or of each token and what its router chose for it."""

    tile: int | None = None
    """Tokens whose hidden activations exist at one time, made again in the backward pass; None: all, kept."""

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout) -> Tensor | Output:
        """`[B, T_local, D]` to the same."""

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""


class FeedForwardConfig(Config, ABC):
    """A feed-forward's table in a recipe, `[model.<name>]`."""

    name: ClassVar[str]

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

    def build(self, dim: int, layer: int, depth: int) -> "Swiglu":
        hidden = self.hidden or -(-8 * dim // (3 * 64)) * 64
        return Swiglu(dim, hidden, depth)


class Swiglu(FeedForward):
    """`(SiLU(x W_gate) * (x W_up)) W_down` (Shazeer 2020), gate and up in one matrix."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim, scale=(2 * depth) ** -0.5)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[B, T_local, D]` to the same, each token by itself."""
        del layout
        if self.tile is not None:
            return tiled_swiglu(x, self.gate_up.weight, self.down.weight, self.tile)
        return self.down(swiglu(self.gate_up(x)))

    @property
    def flops_per_token(self) -> int:
        return self.gate_up.flops_per_token + self.down.flops_per_token

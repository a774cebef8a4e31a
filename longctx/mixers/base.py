"""Token mixer interface: `Mixer`, a layer, and `MixerConfig`, its table in a recipe, which builds it.

A mixer maps `[B, T_local, D]` to `[B, T_local, D]`, where a token depends on the earlier tokens of its document: on
other ranks, as the layout distributes them, or in the cache when decoding.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from longctx.config import Config
from longctx.layers.cache import Cache
from longctx.layers.output import Output
from longctx.mixers.head_mixture import HeadMixtureConfig, HeadRouter
from longctx.mixers.shares import Share
from longctx.moe.head_router import HeadRouting
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.layout import STATE_SCHEDULES, Layout
from longctx.parallel.mesh import Axis


class Mixer(nn.Module, ABC):
    """Base class of token mixers."""

    attention_channels = 0
    """Channels of the scores that the block's router averages with this layer's attention; if > 0, the `Output` has
    `attend`."""
    supports_tensor_parallel: ClassVar[bool] = True
    """Whether the heads can be sharded over tensor-parallel ranks."""
    head_counts: ClassVar[tuple[str, ...]] = ("heads",)
    """Attributes that are numbers of heads, or of channels of all heads; sharding divides them."""

    def __init__(self) -> None:
        super().__init__()
        self.head_router: HeadRouter | None = None
        """Router of a mixture of heads; None if all heads are active."""
        self.tp_axis = Axis()
        """The tensor-parallel ranks that share the heads (`longctx.mixers.tensor_parallel`)."""

    def add_head_router(self, config: HeadMixtureConfig, dim: int, heads: int) -> None:
        """Make the layer, of `heads` heads and width `dim`, a mixture of heads."""
        self.head_router = HeadRouter(config, dim, heads)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor | Output:
        """Run the layer over x `[B, T_local, D]`; return `[B, T_local, D]`, as an `Output` if the layer has a router.

        With a cache (prefill and decode), x holds the next n >= 1 tokens of one document, `layout` is
        `Layout((0, n), past_tokens=cache.tokens)`, and the tokens are added to the cache. Chunked prefill and
        token-by-token decoding match one full forward pass. Raises ValueError if the layout does not continue the
        cache, or if gradients are enabled, since they do not flow through cached tokens.
        """
        if cache is None:
            return self.mix(x, layout, None)
        cache.check(layout)
        out = self.mix(x, layout, cache)
        cache.tokens += layout.length
        return out

    @abstractmethod
    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer; the body of `forward`, after the cache has been checked."""

    @abstractmethod
    def shares(self) -> dict[str, Share]:
        """Return how the parameters, and the buffers with one value per head, are split by heads."""

    def route(self, x: Tensor, layout: Layout) -> HeadRouting | None:
        """Route the tokens of the layer's input x `[B, T_local, D]` to heads; None if all heads are active."""
        return None if self.head_router is None else self.head_router(x, layout)

    @property
    def inactive_heads(self) -> int:
        """Number of inactive heads per token."""
        return 0 if self.head_router is None else self.head_router.inactive_heads

    def new_cache(self) -> Cache:
        """Return an empty cache, for a batch of any size."""
        return Cache()

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> ScheduleChoice | None:
        """Describe which schedule was chosen and why; None if there was no choice."""
        del layout, dtype
        return None

    @abstractmethod
    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of one forward pass over this rank's tokens, without inactive ones."""


class MixerConfig(Config, ABC):
    """Configuration of a mixer, a recipe's table `[model.<name>]`."""

    name: ClassVar[str]
    letter: ClassVar[str]
    """Its letter in `model.layers`."""
    exposes_attention: ClassVar[bool] = False
    """Whether a router can reuse its attention weights (`Mixer.attention_channels`)."""
    same_in_all_layers: ClassVar[bool] = True
    """Whether the parameters are the same at every depth."""
    positions: ClassVar[tuple[str, ...]] = ()
    """Keys that change no tensor, only positions and masks: they may differ from those that the weights had."""

    @abstractmethod
    def build(self, dim: int, layer: int, depth: int, eps: float) -> Mixer:
        """Build the mixer of layer `layer` (from 0) of `depth`, for width `dim`; `eps` is the norms'.

        Raises ValueError if the configuration does not fit the width.
        """

    @abstractmethod
    def shrunk(self) -> Self:
        """Return a version with few, narrow heads, for cheap verification of a model."""

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]]:
        """Return the layout field that selects the mixer's schedule, and the schedules that the mixer supports.

        `size` is the number of context-parallel ranks, `ulysses` x ring.
        """
        del size, ulysses
        return "states", STATE_SCHEDULES

    def routable(self) -> tuple[int, int] | None:
        """Return the numbers of query heads and of query heads per key/value head, for `[model.heads]`; None if the
        mixer does not support a mixture of heads."""
        return None

    def resolved(self, dim: int) -> Self:
        """Return the configuration with the keys filled in that derive from others or from the width `dim`."""
        del dim
        return self

    def warning(self, length: int) -> str | None:
        """Return a sentence about what loses precision on sequences of `length` tokens in float32, if anything does."""
        del length
        return None

    @abstractmethod
    def problems(self, dim: int) -> list[str]:
        """Return the problems for a model of width `dim`, each a message that begins with its key."""


def head_dim_problems(dim: int, heads: int, head_dim: int | None) -> list[str]:
    """Return a problem if `head_dim` is not set and the heads do not divide the width."""
    if head_dim is None and dim % heads:
        return [f"heads: {heads} heads do not divide dim {dim}; set head_dim or change heads"]
    return []

"""What a token mixer is to a model.

A mixer maps `[B, T_local, D]` to `[B, T_local, D]` and lets tokens see earlier ones of the same document, wherever
they lie: the layout says where, or they have been seen before and are remembered. Its configuration names it and builds
it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from longctx.config import Config
from longctx.layers.cache import Cache
from longctx.layers.output import Output
from longctx.mixers.head_mixture import HeadRouter, HeadsMixConfig
from longctx.mixers.shares import Share
from longctx.moe.head_router import HeadRouting
from longctx.parallel.layout import STATE_SCHEDULES, Layout
from longctx.parallel.mesh import Axis


class Mixer(nn.Module, ABC):
    """A token mixer."""

    lent = 0
    """Channels for which the block's router reads its attention once more; its output then brings the attention."""
    divisible: ClassVar[bool] = True
    """Whether ranks can divide the heads between them."""
    counts: ClassVar[tuple[str, ...]] = ("heads",)
    """The attributes that count heads, or channels of all heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.head_router: HeadRouter | None = None
        """Which heads a token reads; all of them where None."""
        self.tp_axis = Axis()
        """The ranks that divide the heads between them (`longctx.mixers.tensor_parallel`)."""

    def mix_heads(self, config: HeadsMixConfig, dim: int, heads: int) -> None:
        """Route the layer's `heads` heads from now on, for width `dim`."""
        self.head_router = HeadRouter(config, dim, heads)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None = None) -> Tensor | Output:
        """Shapes: x and the result `[B, T_local, D]`, an Output where the mixer routes.

        With a memory, one document goes on from the tokens that the layer has seen: x is the next n of them, n at least
        1, and `layout` is `Layout((0, n), past_tokens=memory.tokens)`; after it they are remembered too. The outputs
        are those that the whole document would have at these tokens. Raises ValueError where layout and memory do not
        fit, and with gradients enabled, which do not reach what is remembered.
        """
        if cache is None:
            return self.mix(x, layout, None)
        cache.check(layout)
        out = self.mix(x, layout, cache)
        cache.tokens += layout.length
        return out

    @abstractmethod
    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """The layer's own part of `forward`: what fits has been looked at."""

    @abstractmethod
    def shares(self) -> dict[str, Share]:
        """How heads divide the layer's parameters, and the buffers that have a number for each."""

    def route(self, x: Tensor, layout: Layout) -> HeadRouting | None:
        """Which heads the tokens of the layer's input x `[B, T_local, D]` read; None for all of them."""
        return None if self.head_router is None else self.head_router(x, layout)

    @property
    def unread(self) -> int:
        """Heads that a token does not read."""
        return 0 if self.head_router is None else self.head_router.unread

    def new_cache(self) -> Cache:
        """What the layer remembers before the first token of a document, for a batch of any size."""
        return Cache()

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """What was chosen to reach other ranks' tokens and why, in a line; None where there is nothing to choose."""
        del layout, dtype
        return None

    @abstractmethod
    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of one forward pass over this rank's tokens, only those that are needed."""


class MixerConfig(Config, ABC):
    """A mixer's table in a recipe, `[model.<name>]`."""

    name: ClassVar[str]
    letter: ClassVar[str]
    """Its letter in `model.layers`."""
    lends: ClassVar[bool] = False
    """Whether it is attention whose weights a router can read (`Mixer.lent`)."""
    same_in_all_layers: ClassVar[bool] = True
    """Whether a layer has the same parameters wherever it stands."""

    @abstractmethod
    def build(self, dim: int, layer: int, depth: int, eps: float) -> Mixer:
        """The mixer of layer `layer` (from 0) of `depth`, for width `dim`; `eps` is the norms'.

        Raises ValueError where the configuration does not fit the width.
        """

    @abstractmethod
    def shrunk(self) -> Self:
        """The same kind of mixer, with few and narrow heads, to verify a model with at little cost."""

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]]:
        """How the mixer can reach other ranks' tokens: the field of a layout that says so, and what it may say.

        `size` context-parallel ranks, which are ulysses x ring.
        """
        del size, ulysses
        return "states", STATE_SCHEDULES

    def routable(self) -> tuple[int, int] | None:
        """Query heads that `[model.heads]` can route, and how many neighbours of them read one key/value head; None
        where they cannot be routed."""
        return None

    def resolved(self, dim: int) -> Self:
        """The same layer with what is derived from others of its keys, and from the width `dim`, said."""
        del dim
        return self

    @abstractmethod
    def problems(self, dim: int) -> list[str]:
        """What does not fit the width `dim`, in words, each beginning with the key it is about."""


def head_dim_problems(dim: int, heads: int, head_dim: int | None) -> list[str]:
    """The words for heads that do not divide the width where no head dim is given."""
    if head_dim is None and dim % heads:
        return [f"heads: {heads} heads do not divide dim {dim}; give head_dim, or another number of heads"]
    return []

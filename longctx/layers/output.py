"""Output of layers with a router, or whose attention a router reuses."""

from typing import NamedTuple, Protocol

from torch import Tensor

from longctx.layers.cache import Cache
from longctx.moe.report import RouterReport


class Attend(Protocol):
    """Applies a layer's attention weights, averaged over its heads, to other values."""

    def __call__(self, r: Tensor, cache: Cache | None) -> Tensor:
        """Average the values r `[B, T_local, C]` over earlier tokens; same shape and dtype.

        Differentiable in r and in the layer's queries and keys. When decoding, pass the cache of the layer's own call:
        r is of the new tokens, and is added to the cache.
        """


class Output(NamedTuple):
    """Output of a layer with a router, or whose attention a router reuses; other layers return a tensor."""

    out: Tensor
    """`[B, T_local, D]`."""
    report: RouterReport | None = None
    """Statistics of its router."""
    attend: Attend | None = None
    """The layer's attention, if the block's router uses it; not to be kept after the block, since it holds queries and
    keys."""

    @classmethod
    def of(cls, value: "Tensor | Output") -> "Output":
        """Wrap a layer's output, unless it is an `Output` already."""
        return cls(value) if isinstance(value, Tensor) else value

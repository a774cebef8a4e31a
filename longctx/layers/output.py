"""Outputs of layers that route, or whose attention a router reads once more."""

from typing import NamedTuple, Protocol

from torch import Tensor

from longctx.layers.cache import Cache
from longctx.moe.report import RouterReport


class Attend(Protocol):
    """A layer's attention, the mean of its heads, of other values than its own."""

    def __call__(self, r: Tensor, cache: Cache | None) -> Tensor:
        """`[B, T_local, C]` to the same in r's dtype; differentiable, also in what the attention is made of.

        With the memory that the layer was called with r is of the new tokens, and is remembered.
        """


class Output(NamedTuple):
    """What a layer that routes gives, or whose attention is read once more; any other gives its output alone."""

    out: Tensor
    """`[B, T_local, D]`."""
    report: RouterReport | None = None
    """What its router says."""
    attend: Attend | None = None
    """Its attention, where the block's router reads it: for use within the block, since it holds queries and keys."""

    @classmethod
    def of(cls, given: "Tensor | Output") -> "Output":
        """The same for both kinds of layer."""
        return cls(given) if isinstance(given, Tensor) else given

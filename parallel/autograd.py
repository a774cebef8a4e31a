"""Autograd functions over ranks: no autocast, once differentiable, attributed to the layer that called forward."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.parallel.traffic import current_layer, layer

F = TypeVar("F", bound=Callable[..., Any])


def rank_forward(function: F) -> F:
    """Decorate a forward pass: `exact_forward`, which also saves the current layer for the backward pass."""

    @wraps(function)
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.layer = current_layer()
        return function(ctx, *args)

    return exact_forward(forward)  # type: ignore[return-value]


def rank_backward(function: F) -> F:
    """Decorate a backward pass: `exact_backward`, whose collectives count for the layer of the forward pass."""

    @wraps(function)
    def backward(ctx: Any, *grads: Any) -> Any:
        with layer(ctx.layer):
            return function(ctx, *grads)

    return exact_backward(backward)  # type: ignore[return-value]

"""Autograd functions over ranks: exact, once differentiable, and in the name of the layer that they belong to."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.parallel.traffic import current_layer, layer

F = TypeVar("F", bound=Callable[..., Any])


def rank_forward(function: F) -> F:
    """`exact_forward`, which notes the layer that is being computed for the backward pass."""

    @wraps(function)
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.layer = current_layer()
        return function(ctx, *args)

    return exact_forward(forward)  # type: ignore[return-value]


def rank_backward(function: F) -> F:
    """`exact_backward`, in the name of the layer that was computed forward."""

    @wraps(function)
    def backward(ctx: Any, *grads: Any) -> Any:
        with layer(ctx.layer):
            return function(ctx, *grads)

    return exact_backward(backward)  # type: ignore[return-value]

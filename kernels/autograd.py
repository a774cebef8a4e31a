"""Autograd decorators for the kernels' custom functions: autocast off, and no double backward.

Autocast would cast the matrix products inside a function to bf16, states and sums included. A second derivative through
kernels that write into buffers would be wrong or silently detached.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def exact(ctx: Any, *arguments: Any) -> Any:
        device = next((x.device.type for x in arguments if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(ctx, *arguments)

    return exact


def exact_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward pass: autocast is off inside it."""
    return _without_autocast(function)


def exact_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward pass: autocast is off inside it, and differentiating it raises."""
    return once_differentiable(_without_autocast(function))

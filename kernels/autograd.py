"""What every autograd function of the kernels is wrapped in: it computes in the dtypes that it says, and once.

Autocast would turn the matrix products inside a function into bf16, states and sums included; and a second derivative
through kernels that write into buffers would be wrong, or cut off without a word.
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
    """A forward pass in which autocast is off."""
    return _without_autocast(function)


def exact_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass in which autocast is off, and which raises where it is differentiated itself."""
    return once_differentiable(_without_autocast(function))

"""NaN and infinity in the inputs of a kernel: detection, rows that have them, rows without them.

A product multiplies what a mask hides by 0, and 0 * NaN is NaN: through it a NaN of one token would reach earlier
tokens and other documents. Where a result is not finite, the callers compute it again from inputs in which the rows
that are not finite are 0, and set to NaN what the equations let these rows reach. A result that is finite costs one
sum, and the host reads it: on CUDA it would wait in every pass, so there results are checked within `checks_on_cuda`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_ON_CUDA = ContextVar("longctx_checks_on_cuda", default=False)


@contextmanager
def checks_on_cuda() -> Iterator[None]:
    """Check the results of kernels on CUDA, too, in this thread: to find out which tokens are not finite."""
    token = _ON_CUDA.set(True)
    try:
        yield
    finally:
        _ON_CUDA.reset(token)


def is_checked(x: Tensor) -> bool:
    """Whether results on the device of x are checked: on CPUs always, on CUDA within `checks_on_cuda`.

    Not under torch.compile, which does not trace a branch that reads a tensor.
    """
    return (not x.is_cuda or _ON_CUDA.get()) and not torch.compiler.is_compiling()


def all_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite. May return False for large ones whose sum overflows."""
    return all(bool(torch.isfinite(x.sum())) for x in tensors if x.numel())


def bad_rows(x: Tensor) -> Tensor:
    """Return which rows `[..., D]` have a number that is not finite: `[...]` bool."""
    return ~torch.isfinite(x).all(dim=-1)


def without(x: Tensor, bad: Tensor) -> Tensor:
    """Return x `[..., D]` with 0 in the rows `bad` `[...]`."""
    return x.masked_fill(bad[..., None], 0)


def per_head(bad: Tensor, heads: int) -> Tensor:
    """Bring flags per head, `[B, T, h]`, to `heads`, a multiple or a divisor of h: repeated, or any of a group."""
    if bad.shape[2] <= heads:
        return bad.repeat_interleave(heads // bad.shape[2], dim=2)
    return bad.unflatten(2, (heads, -1)).any(dim=-1)

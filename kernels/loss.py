"""Fused linear cross-entropy in tiles: never materialises a tensor of size tokens x vocabulary.

The gradient with respect to the logits is known as soon as the logits are, so each tile's gradients are computed in the
forward pass and the logits are never recomputed (as in Liger Kernel, Hsu et al. 2024).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.fusion import fused

IGNORE = -100
"""Label of a token without a target (PyTorch's ignore_index)."""

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Combines vocabulary shards: (logsumexp of the shard's logits, label logit, 0 if the label is in another shard), each
`[t]`, to the same pair for the whole vocabulary."""


@fused
def _row_terms(logits: Tensor, targets: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logsumexp of logits `[t, N]` and the logit of `targets` `[t, 1]`, 0 where not `here`, `[t]` each."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    return wide.logsumexp(dim=-1), torch.where(here, wide.gather(-1, targets)[:, 0], 0.0)


@fused
def _logits_grad(logits: Tensor, lse: Tensor, targets: Tensor, here: Tensor, factors: Tensor) -> Tensor:
    """Return `factors * (softmax(logits) - onehot(targets) * here)`, `[t, N]` like logits, which it may overwrite.

    Shapes: lse, here and factors `[t]`, targets `[t, 1]`.
    """
    dlogits = logits.to(lse.dtype).sub_(lse[:, None]).exp_()
    if torch.compiler.is_compiling():
        # A comparison per element is part of the one kernel; indexing would be another.
        columns = torch.arange(dlogits.shape[1], device=dlogits.device)
        dlogits = dlogits - ((columns == targets) & here[:, None]).to(dlogits.dtype)
    else:
        dlogits[torch.arange(len(targets)), targets[:, 0]] -= here.to(dlogits.dtype)
    return dlogits.mul_(factors[:, None]).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, tile: int, scale: Tensor, first: int, merge: Merge | None
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(x.dtype)
        nll = torch.zeros(labels.shape, dtype=dtype, device=x.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=x.device) if needs_weight else None
        for begin in range(0, labels.shape[0], tile):
            part = slice(begin, begin + tile)
            valid = labels[part] >= 0
            targets = labels[part] - first
            # Without shards, a label beyond the vocabulary is an indexing error.
            here = valid if merge is None else valid & (targets >= 0) & (targets < len(weight))
            targets = torch.where(here, targets, 0)[:, None]
            logits = torch.matmul(x[part], weight.T)
            lse, picked = _row_terms(logits, targets, here)
            if merge is not None:
                lse, picked = merge(lse, picked)
            nll[part] = torch.where(valid, lse - picked, 0.0)
            if dx is None and dweight is None:
                continue
            dlogits = _logits_grad(logits, lse, targets, here, valid * scale)
            if dx is not None:
                torch.matmul(dlogits, weight, out=dx[part])
            if dweight is not None:
                dweight += torch.matmul(dlogits.T, x[part])
        ctx.save_for_backward(dx, dweight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return nll.sum() * scale, nll

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        dloss = grads[0]
        return (
            None if dx is None else dx * dloss,
            None if dweight is None else (dweight * dloss).to(ctx.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    tile: int,
    scale: Tensor | float = 1.0,
    first: int = 0,
    merge: Merge | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `scale` times the summed negative log likelihood of `softmax(x weight^T)`, and each token's own.

    Shapes: x `[T, D]`, weight `[N, D]`, labels `[T]` int64, negative (-100) for tokens without a label. The logits of
    `tile` tokens are in memory at one time. Returns the scaled sum (a scalar, differentiable in x and weight) and the
    unscaled values per token `[T]` (nats, 0 without a label, not differentiable), both in the accumulation dtype.

    Divide by the number of labels with `scale`, not afterwards: it multiplies the gradients before they are rounded to
    bf16, where a later factor would itself be rounded to 8 bits.

    `weight` may be the vocabulary shard that begins at row `first`; `merge` then combines the shards, and the gradient
    of x is this shard's summand.
    """
    if labels.shape != x.shape[:1]:
        raise ValueError(f"linear_cross_entropy: labels have shape {list(labels.shape)}: expected [{x.shape[0]}]")
    dtype = accumulation_dtype(x.dtype)
    # Filled on the device: a copy of the number would make the host wait.
    scale = scale.to(x.device, dtype) if isinstance(scale, Tensor) else x.new_full((), scale, dtype=dtype)
    total, nll = _LinearCrossEntropy.apply(x, weight, labels, tile, scale, first, merge)  # type: ignore[no-untyped-call]
    return total, nll

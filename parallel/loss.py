"""Cross-entropy of a head whose vocabulary is divided over ranks, in tiles."""

import torch
from torch import Tensor

from longctx.kernels.loss import linear_cross_entropy
from longctx.parallel.collectives import all_gather
from longctx.parallel.mesh import Axis


def divided_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, tile: int, axis: Axis, scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `longctx.kernels.loss.linear_cross_entropy`, where this rank has rows of the head, `weight [N / size, D]`.

    x `[T, D]` and labels `[T]`, which count through the whole vocabulary, are the same on every rank of the axis. The
    results are those of the whole head and the same on all; the gradient of x is a summand. A tile sends two numbers a
    token. A label beyond the vocabulary is nobody's, and its logit counts as 0.
    """
    group = axis.group
    if group is None:
        return linear_cross_entropy(x, weight, labels, tile, scale)

    def merge(lse: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        each = all_gather(torch.stack([lse, picked]), group).wait()
        return each[:, 0].logsumexp(dim=0), each[:, 1].sum(dim=0)

    return linear_cross_entropy(x, weight, labels, tile, scale, axis.rank * len(weight), merge)

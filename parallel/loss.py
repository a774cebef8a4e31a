"""Vocab-parallel cross-entropy: the tiled loss of a head whose vocabulary is sharded over tensor-parallel ranks."""

import torch
from torch import Tensor

from longctx.kernels.loss import linear_cross_entropy
from longctx.parallel.collectives import all_gather
from longctx.parallel.mesh import Axis


def vocab_parallel_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, tile: int, axis: Axis, scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute `longctx.kernels.loss.linear_cross_entropy` with this rank's rows of the head, `weight [N / size, D]`.

    x `[T, D]` and labels `[T]`, indices into the whole vocabulary, are the same on every rank of the axis. The results
    are those of the whole head, the same on every rank; the gradient of x is a partial sum, to be summed over ranks. A
    tile sends two numbers per token. A label beyond the vocabulary belongs to no rank; its logit counts as 0.
    """
    group = axis.group
    if group is None:
        return linear_cross_entropy(x, weight, labels, tile, scale)

    def merge(lse: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
        shards = all_gather(torch.stack([lse, picked]), group).wait()
        return shards[:, 0].logsumexp(dim=0), shards[:, 1].sum(dim=0)

    return linear_cross_entropy(x, weight, labels, tile, scale, axis.rank * len(weight), merge)

"""Tensor-parallel sharding of one tensor: the dimension along which heads split it. Data only; no modules or groups."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Share(NamedTuple):
    """How a tensor is split over tensor-parallel ranks: each of its consecutive parts by heads, along `dim`.

    A fused projection has several parts (q, k, v), of each of which a rank has its heads.
    """

    dim: int
    parts: tuple[int, ...]
    """Lengths of the parts in the unsharded tensor."""

    def shard(self, tensor: Tensor, rank: int, size: int) -> Tensor:
        """Return a rank's shard of the full tensor."""
        pieces = [part.chunk(size, self.dim)[rank] for part in tensor.split(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the full tensor from the shards of all ranks, in rank order."""
        lengths = [part // len(shards) for part in self.parts]
        pieces = zip(*(shard.split(lengths, self.dim) for shard in shards), strict=True)
        return torch.cat([piece for part in pieces for piece in part], self.dim)


def row_shares(module: nn.Module, *names: str) -> dict[str, Share]:
    """Return shares for the named parameters and buffers that exist and whose rows are heads or channels of heads."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    return {name: Share(0, (len(tensors[name]),)) for name in names if name in tensors}

"""Tensor-parallel shares of a tensor: along which dim heads divide it, part by part. Pure data; no module, no group."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Share(NamedTuple):
    """How ranks divide a tensor: along a dim in which parts lie one after another, each in order of heads."""

    dim: int
    parts: tuple[int, ...]
    """The lengths of the parts, of all ranks together."""

    def of(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What a rank has of the whole tensor."""
        pieces = [part.chunk(size, self.dim)[rank] for part in whole.split(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def whole(self, each: Sequence[Tensor]) -> Tensor:
        """The whole tensor, of what every rank has."""
        lengths = [part // len(each) for part in self.parts]
        pieces = zip(*(x.split(lengths, self.dim) for x in each), strict=True)
        return torch.cat([piece for part in pieces for piece in part], self.dim)


def row_shares(module: nn.Module, *names: str) -> dict[str, Share]:
    """Shares of parameters or buffers of a module whose rows are heads, or channels of heads, and nothing else."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    return {name: Share(0, (len(tensors[name]),)) for name in names if name in tensors}

"""Feature maps: what takes the place of the exponential of softmax attention in linear attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.model.layers import SelfInitialised


class Hedgehog(SelfInitialised):
    """`softmax([x W + b, -(x W + b)])` per head, so that K becomes 2 K (Zhang et al. 2024, The Hedgehog, section 4).

    W begins as the identity and b as zero.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of a parameter (`longctx.model.initialise`)."""
        return torch.eye(shape[-1]).expand(shape) if name == "weight" else torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, H, K]` to `[B, T, H, 2 K]`."""
        y = torch.einsum("bthk,hkj->bthj", x, self.weight) + self.bias
        return torch.cat([y, -y], dim=-1).softmax(dim=-1)


class Elementwise(nn.Module):
    """A feature map that acts on each channel by itself: identity, relu, silu or elu1 (ELU + 1)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if self.name == "relu":
            return F.relu(x)
        if self.name == "silu":
            return F.silu(x)
        return F.elu(x) + 1 if self.name == "elu1" else x


FEATURE_MAPS = ("identity", "relu", "silu", "elu1", "hedgehog")
NOT_NEGATIVE = ("relu", "elu1", "hedgehog")
"""Those with which a denominator makes sense."""


def feature_map(name: str, heads: int, head_dim: int) -> tuple[nn.Module, int]:
    """The map of this name for heads of `head_dim`, and the key dim that it gives."""
    return (Hedgehog(heads, head_dim), 2 * head_dim) if name == "hedgehog" else (Elementwise(name), head_dim)

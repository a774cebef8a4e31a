"""Feature maps as layers (`longctx.kernels.linear.feature_maps`)."""

import torch
from torch import Tensor, nn

from longctx.kernels.linear.feature_maps import ELEMENTWISE, hedgehog
from longctx.layers.basic import SelfInitialised


class Hedgehog(SelfInitialised):
    """The learned map, which doubles the keys' width; its matrix begins as the identity."""

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
        return hedgehog(x, self.weight, self.bias)

    @property
    def flops_per_token(self) -> int:
        """A matrix for each head."""
        return 2 * self.weight.numel()


class Elementwise(nn.Module):
    """A map that acts on each channel by itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ELEMENTWISE[name]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return self.function(x)


def feature_map(name: str, heads: int, head_dim: int) -> tuple[nn.Module, int]:
    """The map of this name for heads of `head_dim`, and the key dim that it gives."""
    return (Hedgehog(heads, head_dim), 2 * head_dim) if name == "hedgehog" else (Elementwise(name), head_dim)

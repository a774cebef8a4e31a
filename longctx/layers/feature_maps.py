"""Feature maps of linear attention, as layers (`longctx.kernels.linear.feature_maps`)."""

import torch
from torch import Tensor, nn

from longctx.kernels.linear.feature_maps import ELEMENTWISE, hedgehog
from longctx.layers.basic import SelfInitialised


class Hedgehog(SelfInitialised):
    """Learned feature map (Hedgehog; Zhang et al. 2024): doubles the key width; its matrix starts as the identity."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(heads, head_dim))
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of a parameter (`longctx.model.initialise`)."""
        return torch.eye(shape[-1]).expand(shape) if name == "weight" else torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, H, K]` to `[B, T, H, 2 K]`."""
        return hedgehog(x, self.weight, self.bias)

    @property
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""
        return 2 * self.weight.numel()


class Elementwise(nn.Module):
    """A feature map that acts on each channel separately."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ELEMENTWISE[name]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function; the shape stays."""
        return self.function(x)


def feature_map(name: str, heads: int, head_dim: int) -> tuple[nn.Module, int]:
    """Build the feature map `name` for heads of `head_dim`; return it and the key dim of its output."""
    return (Hedgehog(heads, head_dim), 2 * head_dim) if name == "hedgehog" else (Elementwise(name), head_dim)

"""The small layers that every model is made of."""

from typing import Literal

import torch
from torch import Tensor, nn

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import rms_norm


class Linear(nn.Linear):
    """A matrix without bias, drawn at initialisation from N(0, `init_std`^2) (`longctx.model.initialise`)."""

    def __init__(self, inputs: int, outputs: int, *, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.init_std = scale * inputs**-0.5

    @property
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""
        return 2 * self.in_features * self.out_features


class RMSNorm(nn.Module):
    """`x * rsqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """The same times `1 + weight`, as in Gemma and Qwen3-Next: the weight begins at 0."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        nn.init.zeros_(self.weight)

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of the weight (`longctx.model.initialise`)."""
        del name, generator
        return torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        # In bfloat16 the sum would lose what makes the weight small.
        return rms_norm(x, 1 + self.weight.to(accumulation_dtype(x.dtype)), self.eps)


Norm = Literal["rms", "zero_centered_rms"]
"""The kinds of `norm_layer`."""


def norm_layer(kind: Norm, dim: int, eps: float) -> RMSNorm:
    """A norm over `dim` channels."""
    return RMSNorm(dim, eps) if kind == "rms" else ZeroCenteredRMSNorm(dim, eps)


class SelfInitialised(nn.Module):
    """A layer whose parameters say themselves what they begin as, to `longctx.model.initialise` too."""

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of the parameter `name`, float32 on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill this layer's own parameters, with torch's global generator."""
        for name, parameter in self.named_parameters(recurse=False):
            with torch.device("cpu"):
                value = self.initial(name, parameter.shape, torch.default_generator)
            parameter.copy_(value)

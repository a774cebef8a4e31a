"""Linear projections and RMSNorm, with the initialisation that each layer declares."""

from typing import Literal

import torch
from torch import Tensor, nn

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import rms_norm


class Linear(nn.Linear):
    """Linear layer without bias, initialised from N(0, `init_std`^2) by `longctx.model.initialise`."""

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
    """RMSNorm with the factor `1 + weight` and the weight initialised to 0, as in Gemma and Qwen3-Next."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        nn.init.zeros_(self.weight)

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of the weight (`longctx.model.initialise`)."""
        del name, generator
        return torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        # In bfloat16 `1 + weight` would round small weights away.
        return rms_norm(x, 1 + self.weight.to(accumulation_dtype(x.dtype)), self.eps)


Norm = Literal["rms", "zero_centered_rms"]
"""Kinds of norm, for `norm_layer`."""


def norm_layer(kind: Norm, dim: int, eps: float) -> RMSNorm:
    """Build a norm over `dim` channels."""
    return RMSNorm(dim, eps) if kind == "rms" else ZeroCenteredRMSNorm(dim, eps)


class SelfInitialised(nn.Module):
    """Base of layers that define the initial values of their parameters, for `longctx.model.initialise` as well."""

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of the parameter `name`, float32 on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise this layer's own parameters with torch's global generator."""
        for name, parameter in self.named_parameters(recurse=False):
            with torch.device("cpu"):
                value = self.initial(name, parameter.shape, torch.default_generator)
            parameter.copy_(value)

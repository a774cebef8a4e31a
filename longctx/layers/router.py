"""Router logits: a projection in float32, under autocast as well."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype


def exact_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Project x `[B, T, D]` by weight `[E, D]`: `[B, T, E]` in float32 (float64 if x is), under autocast as well."""
    dtype = accumulation_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


class Router(nn.Module):
    """Linear router: logits of each token for each expert, in float32 (float64 if the input is)."""

    full_precision = True

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.init_std = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Project `[B, T, D]` to logits `[B, T, E]`."""
        return exact_logits(x, self.weight)

    @property
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""
        return 2 * self.weight.numel()

"""Feature maps: what takes the place of the exponential of softmax attention in linear attention.

They act on queries and keys, before any of the recurrences: `linear_attention(phi(q), phi(k), v, ...)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype


def hedgehog(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`softmax([x W + b, -(x W + b)])` per head, `[B, T, H, K]` to `[B, T, H, 2 K]` (Zhang et al. 2024, section 4).

    Shapes: weight `[H, K, K]`, bias `[H, K]`, learned; the paper begins with the identity and zero.
    """
    y = (torch.einsum("bthk,hkj->bthj", x, weight) + bias).to(accumulation_dtype(x.dtype))
    return torch.cat([y, -y], dim=-1).softmax(dim=-1).to(x.dtype)


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def elu1(x: Tensor) -> Tensor:
    """`ELU(x) + 1` (Katharopoulos et al. 2020, eq. 7)."""
    return F.elu(x) + 1


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "silu": F.silu,
    "elu1": elu1,
}
"""Those without parameters, which act on each channel by itself."""
NOT_NEGATIVE = ("relu", "elu1", "hedgehog")
"""Those with which a denominator makes sense (`linear_attention(..., normalize=True)`)."""

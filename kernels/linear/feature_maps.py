"""Feature maps of linear attention, in place of the exponential of softmax attention.

They are applied to queries and keys before any recurrence: `linear_attention(phi(q), phi(k), v, ...)`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype


def hedgehog(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `softmax([x W + b, -(x W + b)])` per head (Zhang et al. 2024, section 4).

    Shapes: x `[B, T, H, K]`, result `[B, T, H, 2 K]`; weight `[H, K, K]`, bias `[H, K]`, learned; the paper initializes
    them to the identity and zero.
    """
    y = (torch.einsum("bthk,hkj->bthj", x, weight) + bias).to(accumulation_dtype(x.dtype))
    return torch.cat([y, -y], dim=-1).softmax(dim=-1).to(x.dtype)


def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


def elu1(x: Tensor) -> Tensor:
    """Compute `ELU(x) + 1` (Katharopoulos et al. 2020, eq. 7)."""
    return F.elu(x) + 1


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": identity,
    "relu": F.relu,
    "silu": F.silu,
    "elu1": elu1,
}
"""Feature maps without parameters, which act on each channel separately."""
NON_NEGATIVE = ("relu", "elu1", "hedgehog")
"""Feature maps with non-negative outputs, as a normalizer needs (`linear_attention(..., normalize=True)`)."""

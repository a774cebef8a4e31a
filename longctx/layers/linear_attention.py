"""What the linear mixers are put together from."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import rms_norm
from longctx.layers.basic import Linear, SelfInitialised
from longctx.layers.cache import Cache, convolve
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis
from longctx.parallel.norm import rms_norm_across


class ShortConvolution(SelfInitialised):
    """A causal convolution of each channel over `width` tokens, and an activation; documents do not see each other."""

    def __init__(self, channels: int, width: int, *, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of a parameter: uniform up to `width^-1/2`, as torch's convolutions."""
        bound = self.weight.shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """`[B, T_local, D]` to the same."""
        return convolve(x, self.weight, self.bias, layout, self.activation, cache)

    @property
    def flops_per_token(self) -> int:
        """A product and a sum for each tap."""
        return 2 * self.weight.numel()


class HeadNorm(nn.Module):
    """RMSNorm of each head's output, times a weight per channel; where there is a gate, times its activation."""

    def __init__(self, value_dim: int, eps: float, activation: str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(value_dim))
        self.eps, self.activation = eps, activation

    def norm(self, o: Tensor) -> Tensor:
        """Without the gate."""
        return rms_norm(o, self.weight, self.eps)

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """`[B, T, H, V]` to the same, the gate too."""
        normed = self.norm(o)
        if gate is None:
            return normed
        gate = F.silu(gate) if self.activation == "silu" else torch.sigmoid(gate)
        return normed * gate.view(normed.shape)


class WholeNorm(HeadNorm):
    """The same over the channels of all heads together, on whichever ranks they are."""

    def __init__(self, width: int, eps: float, activation: str | None = None) -> None:
        super().__init__(width, eps, activation)
        self.tp_axis = Axis()

    def norm(self, o: Tensor) -> Tensor:
        """Without the gate; `[B, T, H V]`."""
        return rms_norm_across(o, self.weight, self.eps, self.tp_axis)


class LowRank(SelfInitialised):
    """A matrix as the product of two narrow ones, with a bias where asked for."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down, self.up = Linear(inputs, rank), Linear(rank, outputs)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of the bias."""
        return torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., outputs]`."""
        y = self.up(self.down(x))
        return y if self.bias is None else y + self.bias

    @property
    def flops_per_token(self) -> int:
        """Of both matrices."""
        return self.down.flops_per_token + self.up.flops_per_token


class StepDecay(SelfInitialised):
    """`log_decay = -exp(A_log) dt`, `dt = softplus(x + dt_bias)` (Dao & Gu 2024, Mamba-2, section 7), dt within limits.

    exp(A_log), one for each head, begins uniform in [1, 16]; dt_bias, for each channel of x, where dt is log-uniform in
    [0.001, 0.1]. Computed in the accumulation dtype.
    """

    full_precision = True

    def __init__(self, heads: int, channels: int, least: float = 0.0, most: float | None = None) -> None:
        super().__init__()
        self.limits = (least, most) if least or most is not None else None
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of a parameter."""
        uniform = torch.rand(shape, generator=generator)
        if name == "A_log":
            return (1 + 15 * uniform).log()
        dt = torch.exp(math.log(0.001) + uniform * (math.log(0.1) - math.log(0.001)))
        return dt + torch.log(-torch.expm1(-dt))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[B, T, H]` or `[B, T, H, K]`: the logarithms of the decays, and dt, in the same shape."""
        dtype = accumulation_dtype(x.dtype)
        dt = F.softplus(x.to(dtype) + self.dt_bias.to(dtype).view(x.shape[2:]))
        if self.limits is not None:
            dt = dt.clamp(*self.limits)
        rate = self.A_log.to(dtype).exp()
        return -(rate if x.dim() == 3 else rate[:, None]) * dt, dt


def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """`log(sigmoid(x)) / divisor` in the accumulation dtype: decays near 1 (Yang et al. 2024, GLA, section 4.3)."""
    return F.logsigmoid(x.to(accumulation_dtype(x.dtype))) / divisor


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` over the last dimension, in the accumulation dtype and cast once."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (wide.square().sum(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

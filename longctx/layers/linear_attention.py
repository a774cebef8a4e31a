"""Building blocks of the linear mixers: short convolution, output norms, low-rank projections, decays."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.pointwise import Activation, gated_rms_norm, rms_norm
from longctx.layers.basic import Linear, SelfInitialised
from longctx.layers.cache import Cache, cached_convolution
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis
from longctx.parallel.norm import tensor_parallel_rms_norm


class ShortConvolution(SelfInitialised):
    """Causal depthwise convolution over `width` tokens and an activation; it does not cross document boundaries."""

    def __init__(self, channels: int, width: int, *, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of a parameter: uniform in +-`width^-1/2`, as in torch's convolutions."""
        bound = self.weight.shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """Convolve x `[B, T_local, D]`; the shape stays."""
        return cached_convolution(x, self.weight, self.bias, layout, self.activation, cache)

    @property
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""
        return 2 * self.weight.numel()


class HeadNorm(nn.Module):
    """RMSNorm of each head's output, times a weight per channel and, optionally, the activation of an output gate."""

    def __init__(self, value_dim: int, eps: float, activation: Activation = "sigmoid") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(value_dim))
        self.eps, self.activation = eps, activation

    def norm(self, o: Tensor) -> Tensor:
        """Normalise o without applying the gate."""
        return rms_norm(o, self.weight, self.eps)

    def forward(self, o: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalise o `[B, T, H, V]` and multiply it by the activated gate of the same shape, if there is one."""
        return self.norm(o) if gate is None else self.gated_norm(o, gate.view(o.shape))

    def gated_norm(self, o: Tensor, gate: Tensor) -> Tensor:
        """Normalise o and multiply it by the activated gate of the same shape."""
        return gated_rms_norm(o, self.weight, gate, self.eps, self.activation)


class AllHeadsNorm(HeadNorm):
    """RMSNorm over the channels of all heads together, across tensor-parallel ranks, with an optional output gate."""

    def __init__(self, width: int, eps: float, activation: Activation = "sigmoid") -> None:
        super().__init__(width, eps, activation)
        self.tp_axis = Axis()

    def norm(self, o: Tensor) -> Tensor:
        """Normalise o `[B, T, H V]` without applying the gate."""
        return tensor_parallel_rms_norm(o, self.weight, self.eps, self.tp_axis)

    def gated_norm(self, o: Tensor, gate: Tensor) -> Tensor:
        """Normalise o `[B, T, H V]` and multiply it by the activated gate of the same shape."""
        if self.tp_axis.group is None:
            return super().gated_norm(o, gate)
        return self.norm(o) * (F.silu(gate) if self.activation == "silu" else torch.sigmoid(gate))


class LowRank(SelfInitialised):
    """Low-rank linear layer: the product of two narrow matrices, with an optional bias."""

    def __init__(self, inputs: int, rank: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down, self.up = Linear(inputs, rank), Linear(rank, outputs)
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of the bias: 0."""
        return torch.zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Project `[..., D]` to `[..., outputs]`."""
        y = self.up(self.down(x))
        return y if self.bias is None else y + self.bias

    @property
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""
        return self.down.flops_per_token + self.up.flops_per_token


class StepDecay(SelfInitialised):
    """Decay from a step size dt: `log_decay = -exp(A_log) dt`, `dt = softplus(x + dt_bias)` (Mamba-2; Dao & Gu 2024).

    dt is clamped to [dt_min, dt_max]. exp(A_log), one per head, is initialised uniformly in [1, 16];
    dt_bias, one per channel of x, such that dt is log-uniform in [0.001, 0.1] for x = 0. Computed in the accumulation
    dtype.
    """

    full_precision = True

    def __init__(self, heads: int, channels: int, dt_min: float = 0.0, dt_max: float | None = None) -> None:
        super().__init__()
        self.limits = (dt_min, dt_max) if dt_min or dt_max is not None else None
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of a parameter."""
        uniform = torch.rand(shape, generator=generator)
        if name == "A_log":
            return (1 + 15 * uniform).log()
        dt = torch.exp(math.log(0.001) + uniform * (math.log(0.1) - math.log(0.001)))
        return dt + torch.log(-torch.expm1(-dt))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the decays and dt, both of the shape of x: `[B, T, H]` or `[B, T, H, K]`."""
        dtype = accumulation_dtype(x.dtype)
        dt = F.softplus(x.to(dtype) + self.dt_bias.to(dtype).view(x.shape[2:]))
        if self.limits is not None:
            dt = dt.clamp(*self.limits)
        rate = self.A_log.to(dtype).exp()
        return -(rate if x.dim() == 3 else rate[:, None]) * dt, dt


def log_sigmoid(x: Tensor, divisor: float) -> Tensor:
    """Return `log(sigmoid(x)) / divisor` in the accumulation dtype: log decays near 0 (GLA; Yang et al. 2024, 4.3)."""
    return F.logsigmoid(x.to(accumulation_dtype(x.dtype))) / divisor


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """L2-normalise the last dimension, `x / sqrt(sum(x^2) + eps)`: in the accumulation dtype, cast once."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (wide.square().sum(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)

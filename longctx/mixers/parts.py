"""What the linear mixers are put together from."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.pointwise import rms_norm
from longctx.kernels.recurrence import accumulation_dtype
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.division import Share
from longctx.mixers.heads import hidden, read
from longctx.mixers.memory import Memory, convolve
from longctx.model.layers import Linear, SelfInitialised
from longctx.moe.head_router import HeadRouting
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis
from longctx.parallel.norm import rms_norm_across


class HeadsConfig(MixerConfig):
    """The keys of a mixer with heads of equal width."""

    heads: Integer = Field(gt=0)
    """Heads, each with a state of its own."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Width of keys per head; `dim / heads` where absent."""

    def problems(self, dim: int) -> list[str]:
        return head_dim_problems(dim, self.heads, self.head_dim)

    def routable(self) -> tuple[int, int] | None:
        return self.heads, 1

    def key_dim(self, dim: int) -> int:
        """K for a model of width `dim`."""
        return self.head_dim or dim // self.heads


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

    def forward(self, x: Tensor, layout: Layout, memory: Memory | None) -> Tensor:
        """`[B, T_local, D]` to the same."""
        return convolve(x, self.weight, self.bias, layout, self.activation, memory)

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
        self.across = Axis()

    def norm(self, o: Tensor) -> Tensor:
        """Without the gate; `[B, T, H V]`."""
        return rms_norm_across(o, self.weight, self.eps, self.across)


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


class LinearMixer(Mixer):
    """A mixer whose q, k and v come from one projection, perhaps through a short convolution.

    `q_width`, `k_width`, `v_width` are channels of all heads together. A subclass says what its gates are and which
    recurrence reads them; whatever of it has `flops_per_token` is counted.
    """

    counts = ("heads", "qk_heads", "widths")
    writes = 1
    """Times that a token's state is gone over to write: 2 with the delta rule."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        widths: tuple[int, int, int],
        conv: int,
        activation: str | None = "silu",
        qk_heads: int | None = None,
    ) -> None:
        """`conv`: tokens of the convolution, 0 for none; `activation`: what follows it; `qk_heads`: those of q and k,
        a divisor of `heads`, each of which as many neighbours read; `heads` where None."""
        super().__init__()
        self.heads, self.qk_heads, self.widths = heads, qk_heads or heads, widths
        self.qkv = Linear(dim, sum(widths))
        self.conv = ShortConvolution(sum(widths), conv, activation=activation) if conv else None
        self.out = Linear(widths[2], dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Queries, keys and values, their convolution, and the output's columns; a subclass adds its gates'."""
        found = {"qkv.weight": Share(0, self.widths), "out.weight": Share(1, self.widths[2:])}
        return found if self.conv is None else found | {"conv.weight": Share(0, self.widths)}

    def project(
        self, x: Tensor, layout: Layout, memory: Memory | None, routing: HeadRouting | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v by heads, `[B, T_local, H_qk, K]` and `[B, T_local, H, V]`, after the convolution if there is one.

        Queries of heads that a token does not read are zero.
        """
        if self.conv is None and routing is not None:
            for_q, for_kv = self.qkv.weight.split([self.widths[0], self.widths[1] + self.widths[2]])
            k, v = F.linear(x, for_kv).split(self.widths[1:], dim=-1)
            q = read(x, for_q, self.heads, routing)
            return q, k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv = self.conv(qkv, layout, memory)
        heads = (self.qk_heads, self.qk_heads, self.heads)
        q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(qkv.split(self.widths, dim=-1), heads, strict=True))
        return hidden(q, routing), k, v

    def opened(self, gate: nn.Module, x: Tensor, routing: HeadRouting | None) -> Tensor:
        """The output gate of x, `[B, T_local, H, V]`: of the heads that are read, where it is one matrix."""
        if isinstance(gate, Linear):
            return read(x, gate.weight, self.heads, routing)
        return gate(x).unflatten(-1, (self.heads, -1))

    def flops(self, layout: Layout) -> int:
        """Projections and convolutions, and per token and head the writes and a read of the state."""
        per_token = sum(getattr(module, "flops_per_token", 0) for module in self.children())
        key_dim, value_dim = self.widths[1] // self.qk_heads, self.widths[2] // self.heads
        per_token += 2 * (self.writes + 1) * self.heads * key_dim * value_dim
        # Of a head that is not read: its read, its rows of the output projection, of the queries' and the gate's.
        dim, gate = self.out.out_features, getattr(self, "gate", None)
        rows = value_dim + (key_dim if self.conv is None else 0) + (value_dim if isinstance(gate, Linear) else 0)
        return layout.local_length * (per_token - self.unread * (2 * key_dim * value_dim + 2 * dim * rows))

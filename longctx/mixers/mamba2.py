"""Mamba-2 (Dao & Gu 2024, section 7): a state-space model with a scalar decay per head, in its dual (SSD) form.

    z, u, dt = x W_z, SiLU(conv(x W_u)), x W_dt            u = (v, k, q), the paper's x, B, C
    dt = softplus(dt + dt_bias), clamped to [dt_min, dt_max]      log_decay = -exp(A_log) dt
    S_t = exp(log_decay_t) S_{t-1} + k_t (dt_t v_t)^T      o_t = S_t^T q_t + D v_t
    y = RMSNorm(o * SiLU(z)) W_o

The heads of a group share q and k, and the norm is over all heads of a group.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.pointwise import rms_norm
from longctx.layers.basic import Linear, RMSNorm
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import ShortConvolution, StepDecay
from longctx.layers.output import Output
from longctx.mixers.base import Mixer, MixerConfig
from longctx.mixers.head_mixture import project_output, zero_inactive
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout


class Mamba2Config(MixerConfig):
    """`[model.mamba2]`: Mamba-2's state-space layer (letter M)."""

    name: ClassVar[str] = "mamba2"
    letter: ClassVar[str] = "M"

    heads: Integer = Field(gt=0)
    """Number of heads, each with its own decay and state."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head (the paper's P). Default: `2 * dim / heads`."""
    state_dim: Integer = Field(default=128, gt=0)
    """Key width (the paper's N)."""
    groups: Integer = Field(default=1, gt=0)
    """Number of groups of heads that share queries and keys; a divisor of `heads`."""
    conv: Integer = Field(default=4, ge=1, le=8)
    """Kernel size of the short convolution."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    dt_min: float = Field(default=0.0, ge=0)
    """Lower limit of the step size dt."""
    dt_max: float | None = Field(default=None, gt=0)
    """Upper limit of the step size dt. Default: none."""

    def problems(self, dim: int) -> list[str]:
        problems = []
        if self.dt_max is not None and self.dt_min > self.dt_max:
            problems.append(f"dt_min: {self.dt_min} is above dt_max, {self.dt_max}")
        if self.head_dim is None and 2 * dim % self.heads:
            problems.append(f"heads: {self.heads} heads do not divide 2 * dim {2 * dim}; set head_dim or change heads")
        if self.heads % self.groups:
            problems.append(f"groups: {self.groups} groups do not divide {self.heads} heads")
        return problems

    def resolved(self, dim: int) -> "Mamba2Config":
        return self.model_copy(update={"head_dim": self.head_dim or 2 * dim // self.heads})

    def routable(self) -> tuple[int, int] | None:
        return self.heads, 1

    def shrunk(self) -> "Mamba2Config":
        groups = min(self.groups, 2)
        return self.model_copy(update={"heads": 2 * groups, "groups": groups, "head_dim": 8, "state_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Mamba2":
        return Mamba2(self, dim, depth, eps)


class Skip(nn.Module):
    """Skip connection `D v`, with one D per head, initialised to 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, v: Tensor) -> Tensor:
        """Multiply v `[B, T, H, V]` by D; the shape stays."""
        return v * self.weight[:, None]


class GroupedNorm(RMSNorm):
    """RMSNorm over each group of channels separately, with a weight per channel."""

    def __init__(self, dim: int, groups: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.group_size = dim // groups
        """Channels per group."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x `[B, T, D]`; the shape stays."""
        if self.group_size == x.shape[-1]:
            return super().forward(x)
        groups = x.unflatten(-1, (-1, self.group_size))
        return rms_norm(groups, groups.new_ones(self.group_size), self.eps).flatten(2) * self.weight


class Mamba2(Mixer):
    """Mamba-2 layer; z, u and dt come from one projection."""

    head_counts = ("heads", "groups", "width")

    def __init__(self, config: Mamba2Config, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads, self.groups, self.state_dim = config.heads, config.groups, config.state_dim
        self.head_dim = config.head_dim or 2 * dim // config.heads
        self.width = self.heads * self.head_dim
        conv_width = self.width + 2 * self.groups * self.state_dim
        self.inner = Linear(dim, self.width + conv_width + self.heads)
        self.conv = ShortConvolution(conv_width, config.conv, bias=config.conv_bias)
        self.decay = StepDecay(self.heads, self.heads, config.dt_min, config.dt_max)
        self.skip = Skip(self.heads)
        self.norm = GroupedNorm(self.width, self.groups, eps)
        self.out = Linear(self.width, dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Return the shares of all parameters; ranks split groups, and with them their heads."""
        conv_parts = (self.width, *(self.groups * self.state_dim,) * 2)
        shares = {
            "inner.weight": Share(0, (self.width, *conv_parts, self.heads)),
            "conv.weight": Share(0, conv_parts),
            "out.weight": Share(1, (self.width,)),
            **row_shares(self, "decay.A_log", "decay.dt_bias", "skip.weight", "norm.weight"),
        }
        return shares if self.conv.bias is None else shares | {"conv.bias": Share(0, conv_parts)}

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        routing = self.route(x, layout)
        keys = self.groups * self.state_dim
        z, u, dt = self.inner(x).split([self.width, self.width + 2 * keys, self.heads], dim=-1)
        v, k, q = self.conv(u, layout, cache).split([self.width, keys, keys], dim=-1)
        v, k, q = (y.unflatten(-1, (heads, -1)) for y, heads in ((v, self.heads), (k, self.groups), (q, self.groups)))
        log_decay, step = self.decay(dt)
        scaled_v = (v * step[..., None]).to(v.dtype)
        scan = begin_cached_scan(ADDITIVE, k, scaled_v, (log_decay,), layout, cache)
        skip, gate = self.skip(v), F.silu(z)  # overlaps with the state exchange
        out = scan.finish(q)
        heads = zero_inactive(out + skip, routing)
        return project_output(self.norm(heads.flatten(2) * gate).view(heads.shape), self.out, routing)

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of projections and convolution and, per head, of a state update and a read."""
        per_token = sum(module.flops_per_token for module in (self.inner, self.conv, self.out))
        per_token += 4 * self.heads * self.head_dim * self.state_dim
        if self.head_router is not None:
            per_token += self.head_router.flops_per_token
        # An inactive head saves its read of the state and its rows of the output projection; groups share queries.
        saved = 2 * self.head_dim * (self.out.out_features + self.state_dim)
        return layout.local_length * (per_token - self.inactive_heads * saved)

"""Mamba-2 (Dao & Gu 2024, section 7): a state-space model with a scalar decay per head, by its dual form.

    z, u, dt = x W_z, SiLU(conv(x W_u)), x W_dt            u = (v, k, q): in the paper's names x, B, C
    dt = softplus(dt + dt_bias), within limits if there are any      log_decay = -exp(A_log) dt
    S_t = exp(log_decay_t) S_{t-1} + k_t (dt_t v_t)^T      o_t = S_t^T q_t + D v_t
    y = RMSNorm(o * SiLU(z)) W_o

Heads of a group share q and k, and the norm is over the heads of a group together.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.linear.operators import ADDITIVE
from longctx.kernels.pointwise import rms_norm
from longctx.layers.basic import Linear, RMSNorm
from longctx.layers.cache import Cache, scan
from longctx.layers.linear_attention import ShortConvolution, StepDecay
from longctx.layers.output import Output
from longctx.mixers.base import Mixer, MixerConfig
from longctx.mixers.head_mixture import emit, hidden
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout
from longctx.parallel.linear.state_scan import begin_state_scan


class Mamba2Config(MixerConfig):
    """`[model.mamba2]`: Mamba-2's state-space layer (letter M)."""

    name: ClassVar[str] = "mamba2"
    letter: ClassVar[str] = "M"

    heads: Integer = Field(gt=0)
    """Heads, each with a decay and a state of its own."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Width of values per head (the paper's P); `2 dim / heads` where absent."""
    state_dim: Integer = Field(default=128, gt=0)
    """Width of keys (the paper's N)."""
    groups: Integer = Field(default=1, gt=0)
    """Groups of heads that share queries and keys; a divisor of `heads`."""
    conv: Integer = Field(default=4, ge=1, le=8)
    """Tokens of the short convolution."""
    conv_bias: bool = True
    """Whether the convolution adds a bias to each channel."""
    dt_min: float = Field(default=0.0, ge=0)
    """dt, how far a token moves the state, is at least this."""
    dt_max: float | None = Field(default=None, gt=0)
    """And at most this; without a limit where absent."""

    def problems(self, dim: int) -> list[str]:
        found = []
        if self.dt_max is not None and self.dt_min > self.dt_max:
            found.append(f"dt_min: {self.dt_min} is above dt_max, {self.dt_max}")
        if self.head_dim is None and 2 * dim % self.heads:
            found.append(f"heads: {self.heads} heads do not divide 2 * dim {2 * dim}; give head_dim, or another number")
        if self.heads % self.groups:
            found.append(f"groups: {self.groups} groups do not divide {self.heads} heads")
        return found

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
    """`D v`, one D per head, at first 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, v: Tensor) -> Tensor:
        """`[B, T, H, V]` to the same."""
        return v * self.weight[:, None]


class GroupedNorm(RMSNorm):
    """RMSNorm of each group of channels by itself, with a weight for every channel."""

    def __init__(self, dim: int, groups: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.group = dim // groups
        """Channels of a group."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to the same."""
        if self.group == x.shape[-1]:
            return super().forward(x)
        parts = x.unflatten(-1, (-1, self.group))
        return rms_norm(parts, parts.new_ones(self.group), self.eps).flatten(2) * self.weight


class Mamba2(Mixer):
    """The layer; z, u and dt come from one projection."""

    counts = ("heads", "groups", "width")

    def __init__(self, config: Mamba2Config, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads, self.groups, self.state_dim = config.heads, config.groups, config.state_dim
        self.head_dim = config.head_dim or 2 * dim // config.heads
        self.width = self.heads * self.head_dim
        mixed = self.width + 2 * self.groups * self.state_dim
        self.inner = Linear(dim, self.width + mixed + self.heads)
        self.conv = ShortConvolution(mixed, config.conv, bias=config.conv_bias)
        self.decay = StepDecay(self.heads, self.heads, config.dt_min, config.dt_max)
        self.skip = Skip(self.heads)
        self.norm = GroupedNorm(self.width, self.groups, eps)
        self.out = Linear(self.width, dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Groups, and with them their heads."""
        mixed = (self.width, *(self.groups * self.state_dim,) * 2)
        shares = {
            "inner.weight": Share(0, (self.width, *mixed, self.heads)),
            "conv.weight": Share(0, mixed),
            "out.weight": Share(1, (self.width,)),
            **row_shares(self, "decay.A_log", "decay.dt_bias", "skip.weight", "norm.weight"),
        }
        return shares if self.conv.bias is None else shares | {"conv.bias": Share(0, mixed)}

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """See the module's docstring; `[B, T_local, D]` to the same."""
        routing = self.route(x, layout)
        keys = self.groups * self.state_dim
        z, u, dt = self.inner(x).split([self.width, self.width + 2 * keys, self.heads], dim=-1)
        v, k, q = self.conv(u, layout, cache).split([self.width, keys, keys], dim=-1)
        v, k, q = (y.unflatten(-1, (heads, -1)) for y, heads in ((v, self.heads), (k, self.groups), (q, self.groups)))
        log_decay, step = self.decay(dt)
        written = (v * step[..., None]).to(v.dtype)
        begun = begin_state_scan(ADDITIVE, k, written, (log_decay,), layout)
        skipped, gate = self.skip(v), F.silu(z)  # while the states travel
        out = scan(ADDITIVE, q, k, written, (log_decay,), layout, cache, begun)
        read = hidden(out + skipped, routing)
        return emit(self.norm(read.flatten(2) * gate).view(read.shape), self.out, routing)

    def flops(self, layout: Layout) -> int:
        """Projections and convolution, and per token and head a write and a read of the state."""
        per_token = sum(module.flops_per_token for module in (self.inner, self.conv, self.out))
        per_token += 4 * self.heads * self.head_dim * self.state_dim
        if self.head_router is not None:
            per_token += self.head_router.flops_per_token
        # Of a head that is not read: its rows of the output projection, and its read; queries are of whole groups.
        saved = 2 * self.head_dim * (self.out.out_features + self.state_dim)
        return layout.local_length * (per_token - self.unread * saved)

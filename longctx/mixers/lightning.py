"""Lightning attention of TransNormerLLM (Qin et al. 2023, section 3; Lightning Attention-2, 2024) and of MiniMax-01.

    q, k = SiLU(x W_q), SiLU(x W_k)      v, u = x W_v, x W_u
    S_t = lambda S_{t-1} + k_t v_t^T     o_t = S_t^T q_t
    y = (SRMSNorm(o) * u) W_o

There is no score scale and no denominator; SRMSNorm (without weight) is over all heads together. lambda = exp(-s) is
constant per head and layer: s_h is the ALiBi slope of head h times `1 - l / (L - 1) + 1e-5` in layer l of L, so that
later layers decay more slowly.

MiniMax-01 (2025, section 2.2.1) has v = SiLU(x W_v), RMSNorm with a weight, sigmoid(u) instead of u, and slopes
`2^(-8 (h+1) / H)` for any number of heads H, times `1 - l / (L - 1 + 1e-5) + 1e-5`.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.linear.additive import ADDITIVE
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import AllHeadsNorm
from longctx.layers.output import Output
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.head_mixture import project_active, project_output
from longctx.mixers.shares import Share, row_shares
from longctx.mixers.tensor_parallel import local_head_values
from longctx.parallel.layout import Layout
from longctx.parallel.norm import tensor_parallel_rms_norm


class LightningConfig(MixerConfig):
    """`[model.lightning]`: lightning attention, linear attention with a constant decay per head (letter L)."""

    name: ClassVar[str] = "lightning"
    letter: ClassVar[str] = "L"

    heads: Integer = Field(gt=0)
    """Number of heads, each with its own decay."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Key and value width per head. Default: `dim / heads`."""
    form: Literal["transnormer", "minimax"] = "transnormer"
    """Variant of the layer. `minimax` applies SiLU to values as well, a norm with a weight, a sigmoid gate and decays
    in powers of 2 for any number of heads, as in MiniMax-01."""
    norm_eps: float | None = Field(default=None, gt=0)
    """Epsilon of the layer's norm. Default: `model.norm_eps`."""

    def problems(self, dim: int) -> list[str]:
        return head_dim_problems(dim, self.heads, self.head_dim)

    def routable(self) -> tuple[int, int] | None:
        return self.heads, 1

    def shrunk(self) -> "LightningConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8})

    def resolved(self, dim: int) -> "LightningConfig":
        return self.model_copy(update={"head_dim": self.head_dim or dim // self.heads})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Lightning":
        return Lightning(self, dim, layer, depth, self.norm_eps or eps)


def alibi_slopes(heads: int) -> list[float]:
    """Return the ALiBi slopes (Press et al. 2022): `2^(-8 (h+1) / H)` for H a power of two, else the slopes of the
    power below, then every second one of the power above (the authors' interpolation)."""
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: heads - below]


def log_decays(heads: int, layer: int, depth: int) -> list[float]:
    """Return `-s_h` of TransNormerLLM in layer `layer` (from 0) of `depth`."""
    factor = 1 - layer / max(depth - 1, 1) + 1e-5
    return [-slope * factor for slope in alibi_slopes(heads)]


def minimax_log_decays(heads: int, layer: int, depth: int) -> list[float]:
    """Return `-s_h` of MiniMax-01 in layer `layer` (from 0) of `depth`."""
    factor = 1 - layer / (depth - 1 + 1e-5) + 1e-5
    return [-(2.0 ** (-8.0 * (head + 1) / heads)) * factor for head in range(heads)]


class Lightning(Mixer):
    """Lightning attention layer, with a fused q, k, v and gate projection."""

    log_decay: Tensor

    def __init__(self, config: LightningConfig, dim: int, layer: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads, self.eps = config.heads, eps
        self.head_dim = config.head_dim or dim // config.heads
        width = self.heads * self.head_dim
        self.qkvu = Linear(dim, 4 * width)
        self.out = Linear(width, dim, scale=(2 * depth) ** -0.5)
        self.norm = AllHeadsNorm(width, eps, "sigmoid") if config.form == "minimax" else None
        self.layer, self.depth = layer, depth
        self.register_buffer("log_decay", torch.empty(self.heads), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the decays; called again when the layer is materialised from the meta device."""
        with torch.no_grad():
            decays = log_decays if self.norm is None else minimax_log_decays
            self.log_decay.copy_(
                local_head_values(decays(self.heads * self.tp_axis.size, self.layer, self.depth), self)
            )

    def shares(self) -> dict[str, Share]:
        """Return the shares of the fused projection, the output projection, the decays and the norm."""
        width = self.heads * self.head_dim
        shares = {"qkvu.weight": Share(0, (width,) * 4), "out.weight": Share(1, (width,))}
        return shares | row_shares(self, "log_decay", "norm.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        batch, length, _ = x.shape
        width = self.heads * self.head_dim
        routing = self.route(x, layout)
        w_q, w_kv, w_u = self.qkvu.weight.split([width, 2 * width, width])
        k, v = F.linear(x, w_kv).view(batch, length, 2 * self.heads, self.head_dim).chunk(2, dim=2)
        k, gates = F.silu(k), (self.log_decay,)
        v = v if self.norm is None else F.silu(v)
        scan = begin_cached_scan(ADDITIVE, k, v, gates, layout, cache)
        # Overlaps with the state exchange.
        q = F.silu(project_active(x, w_q, self.heads, routing))
        u = project_active(x, w_u, self.heads, routing)
        out = scan.finish(q)
        if self.norm is None:
            normed = tensor_parallel_rms_norm(out.flatten(2), u.flatten(2), self.eps, self.tp_axis)
        else:
            normed = self.norm(out.flatten(2), u.flatten(2))
        return project_output(normed.view(out.shape), self.out, routing)

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of the projections and, per head, of a state update and a read."""
        router = 0 if self.head_router is None else self.head_router.flops_per_token
        projections = router + self.qkvu.flops_per_token + self.out.flops_per_token
        per_token = projections + 4 * self.heads * self.head_dim**2
        # An inactive head saves its read of the state and its rows of the query, gate and output projections.
        saved = self.inactive_heads * (3 * 2 * self.out.out_features * self.head_dim + 2 * self.head_dim**2)
        return layout.local_length * (per_token - saved)

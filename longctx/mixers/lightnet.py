"""LightNet (Qin et al. 2024, You Only Scan Once, section 3): linear attention with keys from a running softmax.

q, v = SiLU(x W_q), x W_v        z_t = log sum_{s <= t} exp(x_s W_k), per channel of K
S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(x_t W_k - z_t) v_t^T        o_t = S_t^T q_t / sqrt(K)
y = (RMSNorm(o) * SiLU(x W_1 W_2)) W_o
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.additive import ADDITIVE
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import AllHeadsNorm, LowRank
from longctx.layers.output import Output
from longctx.mixers.head_mixture import project_output
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout
from longctx.parallel.linear.log_cumsum_exp import log_cumsum_exp


class LightNetConfig(HeadsConfig):
    """`[model.lightnet]`: linear attention whose keys are a running softmax over the document (letter N)."""

    name: ClassVar[str] = "lightnet"
    letter: ClassVar[str] = "N"

    value_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head. Default: `head_dim`."""
    conv: Integer = Field(default=0, ge=0, le=8)
    """Kernel size of a short convolution on q, k and v, without activation; 0 for none."""
    gate_rank: Integer = Field(default=128, gt=0)
    """Rank of the output gate's projection."""

    def shrunk(self) -> "LightNetConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12, "gate_rank": 4})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "LightNet":
        return LightNet(self, dim, depth, eps)


class LightNet(LinearMixer):
    """LightNet layer."""

    def __init__(self, config: LightNetConfig, dim: int, depth: int, eps: float) -> None:
        self.head_dim = config.key_dim(dim)
        width, value_width = config.heads * self.head_dim, config.heads * (config.value_dim or self.head_dim)
        super().__init__(dim, depth, config.heads, (width, width, value_width), config.conv, activation=None)
        self.gate = LowRank(dim, config.gate_rank, value_width)
        self.norm = AllHeadsNorm(value_width, eps, "silu")

    def shares(self) -> dict[str, Share]:
        """Return the shares of the base class, the output gate and the norm."""
        return super().shares() | row_shares(self, "gate.up.weight", "norm.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        routing = self.route(x, layout)
        q, k, v = self.project(x, layout, cache, routing)
        logits = k.to(accumulation_dtype(k.dtype)).flatten(2)
        z, before = log_cumsum_exp(logits, layout)
        if cache is not None:
            if cache.log_sum is not None:
                z, before = torch.logaddexp(z, cache.log_sum), torch.logaddexp(before, cache.log_sum)
            cache.log_sum = z[:, -1:].clone()
        # At the first token of a document `before` is -inf; the recurrence resets the state there by itself.
        log_decay = torch.where(before == float("-inf"), 0.0, before - z).clamp(max=0.0)
        keys, gates = torch.exp(logits - z).view(k.shape).to(k.dtype), (log_decay.view(k.shape),)
        scan = begin_cached_scan(ADDITIVE, keys, v, gates, layout, cache)
        q, gate = F.silu(q) * self.head_dim**-0.5, self.gate(x)  # overlaps with the state exchange
        out = scan.finish(q)
        return project_output(self.norm(out.flatten(2), gate).view(out.shape), self.out, routing)

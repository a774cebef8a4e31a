"""Retention (Sun et al. 2023, RetNet, sections 2.1 and 2.2).

q, k = rotary(x W_q), rotary(x W_k) / sqrt(K)      v, g = x W_v, x W_g
S_t = lambda_h S_{t-1} + k_t v_t^T     o_t = S_t^T q_t
y = (RMSNorm per head of o * SiLU(g)) W_o          lambda_h = 1 - 2^(-5-h)
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from longctx.config import Integer
from longctx.kernels.linear.operators import ADDITIVE
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache, scan
from longctx.layers.linear_attention import HeadNorm
from longctx.layers.output import Output
from longctx.layers.rotary import rotary_table, rotate
from longctx.mixers.head_mixture import emit
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.mixers.tensor_parallel import local_head_values
from longctx.parallel.layout import Layout
from longctx.parallel.linear.state_scan import begin_state_scan


class RetentionConfig(HeadsConfig):
    """`[model.retention]`: retention with rotary positions and a constant decay per head (letter R)."""

    name: ClassVar[str] = "retention"
    letter: ClassVar[str] = "R"

    value_dim: Integer | None = Field(default=None, gt=0)
    """Width of values per head; twice that of keys where absent."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""

    def problems(self, dim: int) -> list[str]:
        found = super().problems(dim)
        if not found and self.key_dim(dim) % 2:
            found.append(f"head_dim: rotary positions turn pairs, so {self.key_dim(dim)} has to be even")
        return found

    def shrunk(self) -> "RetentionConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Retention":
        return Retention(self, dim, depth, eps)


def log_decays(heads: int) -> list[float]:
    """`log(1 - 2^(-5-h))`."""
    return [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]


class Retention(LinearMixer):
    """The layer."""

    log_decay: Tensor

    def __init__(self, config: RetentionConfig, dim: int, depth: int, eps: float) -> None:
        self.head_dim, self.rope_theta = config.key_dim(dim), config.rope_theta
        value_dim = config.value_dim or 2 * self.head_dim
        width = config.heads * self.head_dim
        super().__init__(dim, depth, config.heads, (width, width, config.heads * value_dim), 0)
        self.gate = Linear(dim, config.heads * value_dim)
        self.norm = HeadNorm(value_dim, eps, "silu")
        self.register_buffer("log_decay", torch.empty(config.heads), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill what is not a parameter; called again when the layer leaves the meta device."""
        with torch.no_grad():
            self.log_decay.copy_(local_head_values(log_decays(self.heads * self.tp_axis.size), self))

    def shares(self) -> dict[str, Share]:
        """The output gate and the decays beside the rest."""
        return super().shares() | row_shares(self, "gate.weight", "log_decay")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """See the module's docstring; `[B, T_local, D]` to the same."""
        routing = self.route(x, layout)
        q, k, v = self.project(x, layout, cache, routing)
        table = rotary_table(layout.positions.to(x.device), self.head_dim, self.rope_theta)
        k = rotate(k, table) * self.head_dim**-0.5
        begun = begin_state_scan(ADDITIVE, k, v, (self.log_decay,), layout)
        q, gate = rotate(q, table), self.opened(self.gate, x, routing)  # while the states travel
        out = scan(ADDITIVE, q, k, v, (self.log_decay,), layout, cache, begun)
        return emit(self.norm(out, gate), self.out, routing)

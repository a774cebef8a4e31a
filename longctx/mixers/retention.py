"""Retention (RetNet; Sun et al. 2023, sections 2.1 and 2.2): rotary embedding and a constant decay per head.

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
from longctx.kernels.linear.additive import ADDITIVE
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import HeadNorm
from longctx.layers.output import Output
from longctx.layers.rotary import layout_table, rotate
from longctx.mixers.head_mixture import project_output
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.mixers.tensor_parallel import local_head_values
from longctx.parallel.layout import Layout


class RetentionConfig(HeadsConfig):
    """`[model.retention]`: retention (RetNet), with rotary embedding and a constant decay per head (letter R)."""

    name: ClassVar[str] = "retention"
    letter: ClassVar[str] = "R"
    positions: ClassVar[tuple[str, ...]] = ("rope_theta",)

    value_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head. Default: `2 * head_dim`."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""

    def problems(self, dim: int) -> list[str]:
        problems = super().problems(dim)
        if not problems and self.key_dim(dim) % 2:
            problems.append(f"head_dim: {self.key_dim(dim)} has to be even for rotary embedding")
        return problems

    def shrunk(self) -> "RetentionConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Retention":
        return Retention(self, dim, depth, eps)


def log_decays(heads: int) -> list[float]:
    """Return the log decays of the heads, `log(1 - 2^(-5-h))`."""
    return [math.log1p(-(2.0 ** (-5 - head))) for head in range(heads)]


class Retention(LinearMixer):
    """Retention layer."""

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
        """Fill the decays; called again when the layer is materialised from the meta device."""
        with torch.no_grad():
            self.log_decay.copy_(local_head_values(log_decays(self.heads * self.tp_axis.size), self))

    def shares(self) -> dict[str, Share]:
        """Return the shares of the base class, the output gate and the decays."""
        return super().shares() | row_shares(self, "gate.weight", "log_decay")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        routing = self.route(x, layout)
        q, k, v = self.project(x, layout, cache, routing)
        table = layout_table(layout, x, self.head_dim, self.rope_theta)
        k = rotate(k, table) * self.head_dim**-0.5
        scan = begin_cached_scan(ADDITIVE, k, v, (self.log_decay,), layout, cache)
        q, gate = rotate(q, table), self.project_gate(self.gate, x, routing)  # overlaps with the state exchange
        out = scan.finish(q)
        return project_output(self.norm(out, gate), self.out, routing)

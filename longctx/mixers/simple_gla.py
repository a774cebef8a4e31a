"""Simple GLA: linear attention with a data-dependent decay per head (the gate of Gated RFA, Peng et al. 2021).

q, k, v = SiLU(conv(x W_q)) / sqrt(K), SiLU(conv(x W_k)), SiLU(conv(x W_v))
log_decay = log(sigmoid(x W_a)) / 16, one per head
S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T      o_t = S_t^T q_t
y = (RMSNorm per head of o * SiLU(x W_g)) W_o
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from longctx.config import Integer
from longctx.kernels.linear.additive import ADDITIVE
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import HeadNorm, log_sigmoid
from longctx.layers.output import Output
from longctx.mixers.head_mixture import project_output
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout


class SimpleGlaConfig(HeadsConfig):
    """`[model.simple_gla]`: simple GLA, linear attention with a data-dependent decay per head (letter I)."""

    name: ClassVar[str] = "simple_gla"
    letter: ClassVar[str] = "I"

    value_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head. Default: `head_dim`."""
    conv: Integer = Field(default=4, ge=0, le=8)
    """Kernel size of the short convolution on q, k and v, followed by SiLU; 0 for none."""
    gate_divisor: float = Field(default=16.0, gt=0)
    """Divisor of the log-sigmoid that makes the decay; larger values decay more slowly at initialisation."""

    def shrunk(self) -> "SimpleGlaConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "SimpleGla":
        return SimpleGla(self, dim, depth, eps)


class SimpleGla(LinearMixer):
    """Simple GLA layer."""

    def __init__(self, config: SimpleGlaConfig, dim: int, depth: int, eps: float) -> None:
        self.head_dim, self.gate_divisor = config.key_dim(dim), config.gate_divisor
        value_dim = config.value_dim or self.head_dim
        width = config.heads * self.head_dim
        super().__init__(dim, depth, config.heads, (width, width, config.heads * value_dim), config.conv)
        self.decay = Linear(dim, config.heads)
        self.gate = Linear(dim, config.heads * value_dim)
        self.norm = HeadNorm(value_dim, eps, "silu")

    def shares(self) -> dict[str, Share]:
        """Return the shares of the base class, the decay and the output gate."""
        return super().shares() | row_shares(self, "decay.weight", "gate.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        routing = self.route(x, layout)
        q, k, v = self.project(x, layout, cache, routing)
        log_decay = log_sigmoid(self.decay(x), self.gate_divisor)
        scan = begin_cached_scan(ADDITIVE, k, v, (log_decay,), layout, cache)
        q, gate = q * self.head_dim**-0.5, self.project_gate(self.gate, x, routing)  # overlaps with the state exchange
        out = scan.finish(q)
        return project_output(self.norm(out, gate), self.out, routing)

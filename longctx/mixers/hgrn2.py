"""HGRN2 (Qin et al. 2024, Gated Linear RNNs with State Expansion, section 3.2).

    q = SiLU(x W_q)      f = sigmoid(x W_f)      v = x W_i
    a = l + (1 - l) f    k = 1 - a               per channel of K
    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t
    y = RMSNorm(o) W_o

The lower bound l of the forget gate, per channel, is 0 in the first layer and learned in the others, initialised to
layer / depth. The paper ties the bounds of all layers by a cumulative softmax over depth; here each layer has its own,
`l = sigmoid(bound)`, so that a layer depends only on its own parameters.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.additive import ADDITIVE
from longctx.layers.basic import SelfInitialised
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import AllHeadsNorm
from longctx.layers.output import Output
from longctx.mixers.head_mixture import project_output
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout


class Hgrn2Config(HeadsConfig):
    """`[model.hgrn2]`: HGRN2, a gated linear RNN with an expanded state and keys tied to forget gates (letter H)."""

    name: ClassVar[str] = "hgrn2"
    letter: ClassVar[str] = "H"
    same_in_all_layers: ClassVar[bool] = False

    value_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head. Default: `head_dim`."""
    conv: Integer = Field(default=0, ge=0, le=8)
    """Kernel size of a short convolution on q, f and v, without activation; 0 for none."""

    def shrunk(self) -> "Hgrn2Config":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Hgrn2":
        return Hgrn2(self, dim, layer, depth, eps)


class LowerBound(SelfInitialised):
    """Lower-bounded forget gate, `a = l + (1 - l) sigmoid(f)` with a learned l per channel, computed as log a."""

    full_precision = True

    def __init__(self, channels: int, layer: int, depth: int) -> None:
        super().__init__()
        self.initial_bound = layer / depth
        self.bound = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value of the bound."""
        return torch.full(shape, math.log(self.initial_bound / (1 - self.initial_bound)))

    def forward(self, log_gate: Tensor) -> Tensor:
        """Map `log sigmoid(f)` to `log a`, `[..., channels]`."""
        bound = self.bound.to(log_gate.dtype)
        return torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_gate)


class Hgrn2(LinearMixer):
    """HGRN2 layer."""

    def __init__(self, config: Hgrn2Config, dim: int, layer: int, depth: int, eps: float) -> None:
        key_dim = config.key_dim(dim)
        width = config.heads * key_dim
        value_width = config.heads * (config.value_dim or key_dim)
        super().__init__(dim, depth, config.heads, (width, width, value_width), config.conv, activation=None)
        self.bound = LowerBound(width, layer, depth) if layer > 0 else None
        self.norm = AllHeadsNorm(value_width, eps)

    def shares(self) -> dict[str, Share]:
        """Return the shares of the base class, the lower bound and the norm."""
        return super().shares() | row_shares(self, "bound.bound", "norm.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        routing = self.route(x, layout)
        q, f, v = self.project(x, layout, cache, routing)
        log_decay = F.logsigmoid(f.to(accumulation_dtype(f.dtype)))
        if self.bound is not None:
            log_decay = self.bound(log_decay.flatten(2)).view(f.shape)
        k = -torch.expm1(log_decay)
        out = begin_cached_scan(ADDITIVE, k.to(q.dtype), v, (log_decay,), layout, cache).finish(F.silu(q))
        return project_output(self.norm(out.flatten(2)).view(out.shape), self.out, routing)

"""HGRN-2 (Qin et al. 2024, Gated Linear RNNs with State Expansion, section 3.2).

    q = SiLU(x W_q)      f = sigmoid(x W_f)      v = x W_i
    a = l + (1 - l) f    k = 1 - a               one for each channel of K
    S_t = diag(a_t) S_{t-1} + k_t v_t^T          o_t = S_t^T q_t
    y = RMSNorm(o) W_o

The forget gate's lower bound l of each channel is 0 in the first layer and learned in the others, where it begins as
the layer's share of the depth. The paper ties the layers' bounds together by a cumulated softmax over the depth; here
each layer has its own, `l = sigmoid(bound)`, so that a layer depends on its own parameters alone.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.operators import ADDITIVE
from longctx.layers.basic import SelfInitialised
from longctx.layers.cache import Cache, scan
from longctx.layers.linear_attention import WholeNorm
from longctx.layers.output import Output
from longctx.mixers.head_mixture import emit
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout


class Hgrn2Config(HeadsConfig):
    """`[model.hgrn2]`: a gated linear RNN with an expanded state, keys tied to forget gates (letter H)."""

    name: ClassVar[str] = "hgrn2"
    letter: ClassVar[str] = "H"
    same_in_all_layers: ClassVar[bool] = False

    value_dim: Integer | None = Field(default=None, gt=0)
    """Width of values per head; that of keys where absent."""
    conv: Integer = Field(default=0, ge=0, le=8)
    """Tokens of a short convolution on q, f and v, without activation; 0 for none."""

    def shrunk(self) -> "Hgrn2Config":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Hgrn2":
        return Hgrn2(self, dim, layer, depth, eps)


class LowerBound(SelfInitialised):
    """`a = l + (1 - l) sigmoid(f)` with a learned l for each channel, as a logarithm."""

    full_precision = True

    def __init__(self, channels: int, layer: int, depth: int) -> None:
        super().__init__()
        self.share = layer / depth
        self.bound = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """The first value of the bound."""
        return torch.full(shape, math.log(self.share / (1 - self.share)))

    def forward(self, log_gate: Tensor) -> Tensor:
        """`log sigmoid(f)` to `log a`, `[..., channels]`."""
        bound = self.bound.to(log_gate.dtype)
        return torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + log_gate)


class Hgrn2(LinearMixer):
    """The layer."""

    def __init__(self, config: Hgrn2Config, dim: int, layer: int, depth: int, eps: float) -> None:
        key_dim = config.key_dim(dim)
        width = config.heads * key_dim
        value_width = config.heads * (config.value_dim or key_dim)
        super().__init__(dim, depth, config.heads, (width, width, value_width), config.conv, activation=None)
        self.bound = LowerBound(width, layer, depth) if layer > 0 else None
        self.norm = WholeNorm(value_width, eps)

    def shares(self) -> dict[str, Share]:
        """The lower bound and the norm beside the rest."""
        return super().shares() | row_shares(self, "bound.bound", "norm.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """See the module's docstring; `[B, T_local, D]` to the same."""
        routing = self.route(x, layout)
        q, f, v = self.project(x, layout, cache, routing)
        log_decay = F.logsigmoid(f.to(accumulation_dtype(f.dtype)))
        if self.bound is not None:
            log_decay = self.bound(log_decay.flatten(2)).view(f.shape)
        k = -torch.expm1(log_decay)
        out = scan(ADDITIVE, F.silu(q), k.to(q.dtype), v, (log_decay,), layout, cache)
        return emit(self.norm(out.flatten(2)).view(out.shape), self.out, routing)

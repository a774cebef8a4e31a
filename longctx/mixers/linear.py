"""Linear attention (Katharopoulos et al. 2020): a feature map in place of the exponential, without decay.

q, k = phi(x W_q), phi(x W_k)      S_t = S_{t-1} + k_t v_t^T      o_t = S_t^T q_t [/ (sum_j k_j . q_t + eps)]
y = o W_o        or, without the denominator, RMSNorm per head of o before W_o
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.api import append_normalizer, divide_by_normalizer
from longctx.kernels.linear.feature_maps import NON_NEGATIVE
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.feature_maps import feature_map
from longctx.layers.linear_attention import HeadNorm
from longctx.layers.output import Output
from longctx.mixers.base import Mixer
from longctx.mixers.head_mixture import project_active, project_output, zero_inactive
from longctx.mixers.linear_mixer import HeadsConfig
from longctx.mixers.shares import Share, row_shares
from longctx.moe.head_router import HeadRouting
from longctx.parallel.layout import Layout

LONG = 2**14
"""Tokens from which the normalizer's cancellation costs more than two digits."""


class LinearConfig(HeadsConfig):
    """`[model.linear]`: basic linear attention, with a feature map and without decay (letter B)."""

    name: ClassVar[str] = "linear"
    letter: ClassVar[str] = "B"

    kv_heads: Integer | None = Field(default=None, gt=0)
    """Number of key/value heads, each with a recurrent state; a divisor of `heads`. Default: `heads`."""
    feature_map: Literal["identity", "relu", "silu", "elu1", "hedgehog"] = "elu1"
    """Feature map of queries and keys; `hedgehog` is learned and doubles the key width."""
    normalize: bool = True
    """Divide each output by the sum of its weights; otherwise apply RMSNorm per head. The gradient of queries then
    loses digits on long sequences where the values of a head have a mean (docs/exactness.md)."""

    def warning(self, length: int) -> str | None:
        if not self.normalize or length < LONG:
            return None
        return (
            f"model.linear.normalize: on {length} tokens the gradient of queries may lose 3 to 5 of float32's 7 digits "
            "where values have a mean (docs/exactness.md); normalize = false has no such terms"
        )

    def problems(self, dim: int) -> list[str]:
        problems = super().problems(dim)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            problems.append(f"kv_heads: {self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        if self.normalize and self.feature_map not in NON_NEGATIVE:
            problems.append(
                f"normalize: {self.feature_map} has negative features, whose sum may be 0; set normalize = false or "
                f"use one of {', '.join(NON_NEGATIVE)}"
            )
        return problems

    def shrunk(self) -> "LinearConfig":
        kv_heads = self.kv_heads or self.heads
        few, group = min(kv_heads, 2), min(self.heads // kv_heads, 4)
        return self.model_copy(update={"heads": few * group, "kv_heads": few, "head_dim": 8})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "BasicLinear":
        return BasicLinear(self, dim, depth, eps)


class BasicLinear(Mixer):
    """Basic linear attention layer, with a fused q, k, v projection."""

    head_counts = ("heads", "kv_heads")

    def __init__(self, config: LinearConfig, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.key_dim(dim)
        self.qkv = Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.feature_q, self.feature_dim = feature_map(config.feature_map, self.heads, self.head_dim)
        self.feature_k, _ = feature_map(config.feature_map, self.kv_heads, self.head_dim)
        self.norm = None if config.normalize else HeadNorm(self.head_dim, eps)
        self.out = Linear(self.heads * self.head_dim, dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Return the shares of the q, k, v projection, the output projection and learned feature maps."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        maps = [f"feature_{x}.{name}" for x in "qk" for name in ("weight", "bias")]
        return {
            "qkv.weight": Share(0, (width, kv_width, kv_width)),
            "out.weight": Share(1, (width,)),
            **row_shares(self, *maps),
        }

    def project(self, x: Tensor, routing: HeadRouting | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q `[B, T_local, H, K]`, zero for inactive heads, and k and v `[B, T_local, H_kv, K]`."""
        if routing is None:
            heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
            return q, k, v
        width = self.heads * self.head_dim
        w_q, w_kv = self.qkv.weight.split([width, len(self.qkv.weight) - width])
        k, v = F.linear(x, w_kv).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        return project_active(x, w_q, self.heads, routing), k, v

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, as in the module's docstring; the shape stays."""
        routing = self.route(x, layout)
        q, k, v = self.project(x, routing)
        # The features of zero queries need not be zero.
        q, k = zero_inactive(self.feature_q(q), routing), self.feature_k(k)
        if self.norm is None:
            # In float32: the sum of weights can overflow float16, and its rounding error would affect every channel.
            wide = accumulation_dtype(v.dtype)
            scan = begin_cached_scan(ADDITIVE, k.to(wide), append_normalizer(v.to(wide)), (), layout, cache)
            o = divide_by_normalizer(scan.finish(q.to(wide))).to(v.dtype)
        else:
            out = begin_cached_scan(ADDITIVE, k, v, (), layout, cache).finish(q)
            o = self.norm(out)
        return project_output(o, self.out, routing)

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of the projections and, per token, of a state update per key/value head and a
        read per query head."""
        per_token = sum(getattr(module, "flops_per_token", 0) for module in self.children())
        channels = self.head_dim + (self.norm is None)
        per_token += 2 * (self.heads + self.kv_heads) * self.feature_dim * channels
        # An inactive head saves its read of the state and its rows of the query and output projections.
        saved = 2 * 2 * self.out.out_features * self.head_dim + 2 * self.feature_dim * channels
        return layout.local_length * (per_token - self.inactive_heads * saved)

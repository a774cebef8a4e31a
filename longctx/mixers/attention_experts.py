"""Attention experts (mixture of attention, BAM; Zhang et al. 2024): soft-routed softmax attentions, all computed."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from longctx.config import Integer
from longctx.layers.cache import Cache
from longctx.layers.output import Output
from longctx.layers.router import Router
from longctx.mixers.base import MixerConfig
from longctx.mixers.softmax import Softmax, SoftmaxConfig
from longctx.moe.attention_experts import KeysValues, flatten_expert_heads, soft_routing
from longctx.parallel.layout import Layout


class AttentionExpertsConfig(MixerConfig):
    """`[model.attention_experts]`: several softmax attentions, summed with each token's soft weights (letter A)."""

    name: ClassVar[str] = "attention_experts"
    letter: ClassVar[str] = "A"
    positions: ClassVar[tuple[str, ...]] = ("rope_theta", "window")

    experts: Integer = Field(gt=0)
    """Number of experts, each a softmax attention with its own queries and output matrix; all are computed."""
    heads: Integer = Field(gt=0)
    """Number of query heads per expert."""
    kv_heads: Integer | None = Field(default=None, gt=0)
    """Number of key/value heads, per expert or, with `kv = "shared"`, of all experts; a divisor of `heads`.
    Default: `heads`."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Width of a head. Default: `dim / heads`."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    window: Integer | None = Field(default=None, gt=0)
    """Sliding window: the number of tokens visible to a token, itself included. Default: all earlier ones."""
    kv: KeysValues = "each"
    """`each`: every expert has its own keys and values. `shared`: all experts share one set, which divides
    communication and KV cache by the number of experts."""

    @property
    def expert(self) -> SoftmaxConfig:
        """The configuration of one expert as a softmax layer."""
        return SoftmaxConfig(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            window=self.window,
        )

    def fused(self, dim: int) -> SoftmaxConfig:
        """Return the configuration of the one softmax attention that computes all experts, for width `dim`."""
        sets = self.experts if self.kv == "each" else 1
        changes = {
            "heads": self.experts * self.heads,
            "kv_heads": sets * (self.kv_heads or self.heads),
            "head_dim": self.head_dim or dim // self.heads,
        }
        return self.expert.model_copy(update=changes)

    def problems(self, dim: int) -> list[str]:
        return self.expert.problems(dim)

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]]:
        return self.expert.model_copy(update={"heads": self.experts * self.heads}).available_schedules(size, ulysses)

    def shrunk(self) -> "AttentionExpertsConfig":
        small = self.expert.shrunk()
        changes = {key: getattr(small, key) for key in ("heads", "kv_heads", "head_dim", "window")}
        return self.model_copy(update={"experts": min(self.experts, 3), **changes})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "AttentionExperts":
        return AttentionExperts(self, dim, depth, eps)


class AttentionExperts(Softmax):
    """`sum_j softmax(W_r x)_j MHA_j(x)`, computed as one attention over the heads of all experts.

    The rows of `qkv` are the query heads of all experts in the order of
    `longctx.moe.attention_experts.flatten_expert_heads`, then all key heads and all value heads (expert by expert with
    kv = "each"); the columns of `out` are the query heads in the same order. `longctx.moe.attention_upcycle` builds
    both from dense layers' weights.
    """

    supports_tensor_parallel = False

    def __init__(self, config: AttentionExpertsConfig, dim: int, depth: int, eps: float) -> None:
        super().__init__(config.fused(dim), dim, depth, eps)
        self.kv: KeysValues = config.kv
        self.groups = config.kv_heads or config.heads
        """Key/value heads per expert."""
        self.group_size = config.heads // self.groups
        """Query heads per expert and key/value head."""
        # Initialise each expert as a separate layer: fan-in is the width of its own heads.
        self.out.init_std *= config.experts**0.5
        self.router = Router(dim, config.experts)

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Output:
        """Compute the layer for x `[B, T_local, D]`; return its output and the router's report."""
        weights, report = soft_routing(self.router(x), layout)
        out, _ = self.attention(x, layout, cache)
        per_head = weights[..., None, None].expand(-1, -1, -1, self.groups, self.group_size)
        out = out * flatten_expert_heads(per_head, 2, self.kv)[..., None].to(out.dtype)
        return Output(self.out(out.flatten(2)), report)

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of the attention over all heads and of the router."""
        return super().flops(layout) + layout.local_length * self.router.flops_per_token

"""Softmax attention by several experts, all of which each token takes, by soft weights (Zhang et al. 2024, BAM)."""

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
from longctx.moe.attention_experts import KeysValues, side_by_side, soft_routing
from longctx.parallel.layout import Layout


class AttentionExpertsConfig(MixerConfig):
    """`[model.attention_experts]`: several softmax attentions, summed by soft weights of each token (letter A)."""

    name: ClassVar[str] = "attention_experts"
    letter: ClassVar[str] = "A"

    experts: Integer = Field(gt=0)
    """Experts, each a softmax attention with queries and an output matrix of its own. All are computed."""
    heads: Integer = Field(gt=0)
    """Query heads of each expert."""
    kv_heads: Integer | None = Field(default=None, gt=0)
    """Key/value heads, a divisor of `heads`, of each expert, or with `kv = "shared"` of all together; `heads` where
    absent."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """`dim / heads` where absent."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    window: Integer | None = Field(default=None, gt=0)
    """A token sees the newest `window` tokens of its document, itself included; all earlier ones where absent."""
    kv: KeysValues = "each"
    """`each`: every expert has keys and values of its own; `shared`: all experts read the same ones, which is fewer
    bytes to send and to remember by the number of experts."""

    @property
    def expert(self) -> SoftmaxConfig:
        """One of them, as a layer by itself."""
        return SoftmaxConfig(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_theta=self.rope_theta,
            window=self.window,
        )

    def together(self, dim: int) -> SoftmaxConfig:
        """The one attention that computes all of them, for a model of width `dim`."""
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
    """`sum_j softmax(W_r x)_j MHA_j(x)`, as one attention over the heads of all experts.

    The rows of `qkv` are the query heads of all experts, in the order of `longctx.moe.attention_experts.side_by_side`,
    then the key heads, then the value heads, with `each` expert by expert; the columns of `out` are the query heads in
    the same order. `longctx.moe.attention_upcycle` makes both of dense layers' weights.
    """

    divisible = False

    def __init__(self, config: AttentionExpertsConfig, dim: int, depth: int, eps: float) -> None:
        super().__init__(config.together(dim), dim, depth, eps)
        self.kv: KeysValues = config.kv
        self.groups = config.kv_heads or config.heads
        """Key/value heads that one expert reads."""
        self.share = config.heads // self.groups
        """Query heads of one expert that read one of them."""
        # Each expert begins as it would alone: as many inputs as its own heads have.
        self.out.init_std *= config.experts**0.5
        self.router = Router(dim, config.experts)

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Output:
        """`[B, T_local, D]` to the same, and how even the weights are."""
        weights, report = soft_routing(self.router(x), layout)
        out, _ = self.attention(x, layout, cache)
        by_head = side_by_side(weights[..., None, None].expand(-1, -1, -1, self.groups, self.share), 2, self.kv)
        out = out * by_head[..., None].to(out.dtype)
        return Output(self.out(out.flatten(2)), report)

    def flops(self, layout: Layout) -> int:
        """Of the attention over all heads, and of the router."""
        return super().flops(layout) + layout.local_length * self.router.flops_per_token

"""Causal softmax attention with grouped key/value heads and rotary positions, as in Llama.

Queries and keys may be normed head by head before they are turned, and what a head gives may be multiplied with the
sigmoid of a projection of the layer's input (Qiu et al. 2025, Gated Attention, the form after the values).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.routed.head_projection import project_to_pairs
from longctx.layers.basic import Linear, Norm, norm_layer
from longctx.layers.cache import Cache, attend, attend_to_scores
from longctx.layers.output import Attend, Output
from longctx.layers.rotary import RopeScaling, rotary_table, rotate, rotate_rows
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.head_mixture import HeadRouter, emit, emit_pairs, split_routed
from longctx.mixers.shares import Share, row_shares
from longctx.moe.heads import Pairs, attend_pairs
from longctx.parallel.attention.api import rank_schedules, softmax_attention
from longctx.parallel.attention.cost_model import AttentionShape, explained, fitting
from longctx.parallel.attention.visibility import Reach, score_elements
from longctx.parallel.layout import Layout


class SoftmaxConfig(MixerConfig):
    """`[model.softmax]`: causal softmax attention with rotary positions (letter S)."""

    name: ClassVar[str] = "softmax"
    letter: ClassVar[str] = "S"
    lends: ClassVar[bool] = True

    heads: Integer = Field(gt=0)
    """Query heads."""
    kv_heads: Integer | None = Field(default=None, gt=0)
    """Key/value heads, a divisor of `heads` (grouped-query attention); `heads` where absent."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """`dim / heads` where absent."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rotary_dim: Integer | None = Field(default=None, gt=0)
    """Channels of a head that are turned, the first ones, an even number; all where absent."""
    rope_scaling: RopeScaling | None = None
    """Without it no frequency is scaled."""
    qk_norm: Norm | None = None
    """Norm of queries and keys, of each head by itself, with a weight per channel that heads share: `rms`, or
    `zero_centered_rms`, which multiplies with 1 plus its weight; none where absent."""
    output_gate: bool = False
    """Multiply what heads give with the sigmoid of a projection of the layer's input, channel by channel."""
    window: Integer | None = Field(default=None, gt=0)
    """A token sees the newest `window` tokens of its document, itself included; all earlier ones where absent."""

    def problems(self, dim: int) -> list[str]:
        found = head_dim_problems(dim, self.heads, self.head_dim)
        head_dim = self.head_dim or dim // self.heads
        if not found and self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > head_dim):
            found.append(
                f"rotary_dim: rotary positions turn pairs of a head's {head_dim} channels: {self.rotary_dim} has to be "
                "even, and no more than these"
            )
        elif not found and self.rotary_dim is None and head_dim % 2:
            found.append(f"head_dim: rotary positions turn pairs, so {head_dim} has to be even")
        if self.rope_scaling is not None:
            found += [f"rope_scaling.{problem}" for problem in self.rope_scaling.problems()]
        if self.kv_heads is not None and self.heads % self.kv_heads:
            found.append(f"kv_heads: {self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        return found

    def resolved(self, dim: int) -> "SoftmaxConfig":
        head_dim = self.head_dim or dim // self.heads
        changes = {"kv_heads": self.kv_heads or self.heads, "rotary_dim": self.rotary_dim or head_dim}
        return self.model_copy(update={"head_dim": head_dim, **changes})

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]]:
        return "attention", fitting(self.heads, size, ulysses)

    def routable(self) -> tuple[int, int] | None:
        return self.heads, self.heads // (self.kv_heads or self.heads)

    def shrunk(self) -> "SoftmaxConfig":
        kv_heads = self.kv_heads or self.heads
        # As many query heads as a verification has ranks, where there are so many, so that all schedules fit.
        group = min(self.heads // kv_heads, 4)
        few = min(kv_heads, 2 if group > 1 else 4)
        window = None if self.window is None else min(self.window, 16)
        rotary_dim = None if self.rotary_dim is None else 4
        changes = {"heads": few * group, "kv_heads": few, "head_dim": 8, "window": window, "rotary_dim": rotary_dim}
        return self.model_copy(update=changes)

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Softmax":
        return Softmax(self, dim, depth, eps)


class Softmax(Mixer):
    """The layer; q, k and v come from one projection."""

    counts = ("heads", "kv_heads")

    def __init__(self, config: SoftmaxConfig, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or dim // config.heads
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        self.rotary_dim = config.rotary_dim or self.head_dim
        self.reach = Reach(window=config.window)
        self.qkv = Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        kind = config.qk_norm
        self.q_norm = None if kind is None else norm_layer(kind, self.head_dim, eps)
        self.k_norm = None if kind is None else norm_layer(kind, self.head_dim, eps)
        self.gate = Linear(dim, self.heads * self.head_dim) if config.output_gate else None
        self.out = Linear(self.heads * self.head_dim, dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Queries, keys and values; the gate; the output's columns."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {"qkv.weight": Share(0, (width, kv_width, kv_width)), "out.weight": Share(1, (width,))}
        return found | row_shares(self, "gate.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """`[B, T_local, D]` to the same; positions count from the start of each document."""
        if self.head_router is not None and cache is None:
            return self._mixture(self.head_router, x, layout)
        heads, attend = self.attention(x, layout, cache)
        if self.gate is not None:
            heads = heads * self.gate(x).sigmoid().view(heads.shape)
        if self.head_router is not None:
            seen = x
            if self.head_router.by_norm:
                seen = F.linear(x, self.qkv.weight[: self.heads * self.head_dim]).unflatten(-1, (self.heads, -1))
            return emit(heads, self.out, self.head_router(seen, layout))
        out = self.out(heads.flatten(2))
        return Output(out, attend=attend) if self.lent else out

    def attention(self, x: Tensor, layout: Layout, cache: Cache | None) -> tuple[Tensor, Attend]:
        """What the heads give, `[B, T_local, H, K]`, and their attention for other values."""
        scale, window = self.head_dim**-0.5, self.reach.window
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = self._turned(q, k, self._table(layout, x))
        if cache is None:
            out = softmax_attention(q, k, v, layout, scale, window=window)
        else:
            out, k = attend(q, k, v, layout, scale, window, cache.keys)
        return out, partial(attend_to_scores, q, k, layout, scale, window)

    def _table(self, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(layout.positions.to(x.device), self.rotary_dim, self.rope_theta, self.rope_scaling)

    def _turned(self, q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q and k `[B, T_local, ., K]`, normed where there are norms, turned to their positions."""
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(q, table), rotate(k, table)

    def _mixture(self, router: HeadRouter, x: Tensor, layout: Layout) -> Output:
        """The same of the (token, head) pairs that are read, gathered from the first projection to the last."""
        rows, share = self.heads * self.head_dim, self.heads // self.kv_heads
        for_q, for_kv = self.qkv.weight.split([rows, 2 * self.kv_heads * self.head_dim])
        k, v = F.linear(x, for_kv).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        if router.by_norm:
            q = F.linear(x, for_q).unflatten(-1, (-1, self.head_dim))
            routing = router(q, layout)
            routed = routing.chosen.shape[2]
            pairs = Pairs.of(routing.chosen, routed // share)
            shared, of_routed = q.split([self.heads - routed, routed], dim=2)
            queries = pairs.gather(of_routed).transpose(1, 2)
        else:
            routing = router(x, layout)
            pairs = Pairs.of(routing.chosen, routing.chosen.shape[2] // share)
            for_shared, for_routed = split_routed(for_q, self.heads, routing)
            shared = F.linear(x, for_shared).unflatten(-1, (-1, self.head_dim))
            queries = project_to_pairs(x, for_routed, routing.chosen, pairs.places, pairs.index.numel())
            queries = queries.view(*pairs.index.shape, self.head_dim)
        table = self._table(layout, x)
        shared, k = self._turned(shared, k, table)
        queries = queries if self.q_norm is None else self.q_norm(queries)
        queries = rotate_rows(queries, pairs.rows, table)
        scale, window = self.head_dim**-0.5, self.reach.window
        of_shared, of_pairs = attend_pairs(shared, queries, k, v, pairs, layout, scale, window=window)
        if self.gate is not None:
            for_shared, for_routed = split_routed(self.gate.weight, self.heads, routing)
            opened = project_to_pairs(x, for_routed, routing.chosen, pairs.places, pairs.index.numel())
            of_shared = of_shared * F.linear(x, for_shared).sigmoid().view(of_shared.shape)
            of_pairs = of_pairs * opened.sigmoid().view(of_pairs.shape)
        return emit_pairs(of_shared, of_pairs, self.out, routing, pairs)

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """The schedule and its expected costs, where the layout leaves it to be chosen."""
        if layout.size == 1 or layout.attention != "auto":
            return None
        found = []
        for words, heads, kv_heads in self._attentions():
            shape = AttentionShape(heads, kv_heads, self.head_dim, self.head_dim, dtype.itemsize, self.reach)
            found.append(words + explained(rank_schedules(layout, shape)))
        return "; ".join(found)

    def _attentions(self) -> Iterator[tuple[str, int, int]]:
        """What is attended with at once: words for it, query heads, key/value heads."""
        if self.head_router is None:
            yield "", self.heads, self.kv_heads
            return
        share, shared = self.heads // self.kv_heads, self.head_router.shared // self.tp_axis.size
        if shared:
            yield "shared heads: ", shared, shared // share
        # The queries of all heads that read one of keys and values lie together.
        routed = self.kv_heads - shared // share
        yield "routed heads: ", routed, routed

    def flops(self, layout: Layout) -> int:
        """Projections, and for each visible pair of tokens a score and a weighted value; both again for a router."""
        router = 0 if self.head_router is None else self.head_router.flops_per_token
        read = self.heads - self.unread
        # Queries are looked at to be routed by their norms.
        queries = 0 if self.head_router is not None and self.head_router.by_norm else self.unread
        dim, width = self.out.out_features, self.head_dim
        gates = 0 if self.gate is None else read
        projections = router + self.qkv.flops_per_token + 2 * dim * width * (read + gates - queries)
        again = self.heads * (width + self.lent) if self.lent else 0
        return layout.local_length * projections + 2 * (2 * read * width + again) * score_elements(layout, self.reach)

"""Softmax attention: causal, with grouped-query heads, rotary embedding and sliding windows, as in Llama.

Optionally with per-head norms of queries and keys (QK-norm) before the rotary embedding, and with an output gate, the
sigmoid of a projection of the layer's input (Gated Attention; Qiu et al. 2025, after the values).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.attention.block import IntervalMask
from longctx.kernels.routed.head_projection import project_to_pairs
from longctx.layers.basic import Linear, Norm, norm_layer
from longctx.layers.cache import Cache, cached_attention, cached_score_attention
from longctx.layers.output import Attend, Output
from longctx.layers.rotary import RopeScaling, Table, layout_table, rotate, rotate_rows
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.head_mixture import HeadRouter, project_output, project_output_pairs, split_routed
from longctx.mixers.shares import Share, row_shares
from longctx.moe.heads import Pairs, pair_attention
from longctx.parallel.attention.api import rank_schedules, softmax_attention
from longctx.parallel.attention.cost_model import AttentionShape, ScheduleChoice, fitting
from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.layout import Layout


class SoftmaxConfig(MixerConfig):
    """`[model.softmax]`: causal softmax attention with rotary embedding (letter S)."""

    name: ClassVar[str] = "softmax"
    letter: ClassVar[str] = "S"
    exposes_attention: ClassVar[bool] = True
    positions: ClassVar[tuple[str, ...]] = ("rope_theta", "rope_scaling", "window")

    heads: Integer = Field(gt=0)
    """Number of query heads."""
    kv_heads: Integer | None = Field(default=None, gt=0)
    """Number of key/value heads (grouped-query attention), a divisor of `heads`. Default: `heads`."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Width of a head. Default: `dim / heads`."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    rotary_dim: Integer | None = Field(default=None, gt=0)
    """Number of channels per head with rotary embedding, the first ones; even. Default: all."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies. Default: none."""
    qk_norm: Norm | None = None
    """Norm of each head's queries and keys, with a weight per channel that heads share: `rms`, or `zero_centered_rms`,
    which multiplies by 1 + weight. Default: none."""
    output_gate: bool = False
    """Multiply the heads' outputs by the sigmoid of a projection of the layer's input, per channel."""
    window: Integer | None = Field(default=None, gt=0)
    """Sliding window: the number of tokens visible to a token, itself included. Default: all earlier ones."""

    def problems(self, dim: int) -> list[str]:
        problems = head_dim_problems(dim, self.heads, self.head_dim)
        head_dim = self.head_dim or dim // self.heads
        if not problems and self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > head_dim):
            problems.append(f"rotary_dim: {self.rotary_dim} has to be even and at most head_dim {head_dim}")
        elif not problems and self.rotary_dim is None and head_dim % 2:
            problems.append(f"head_dim: {head_dim} has to be even for rotary embedding")
        if self.rope_scaling is not None:
            problems += [f"rope_scaling.{problem}" for problem in self.rope_scaling.problems()]
        if self.kv_heads is not None and self.heads % self.kv_heads:
            problems.append(f"kv_heads: {self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        return problems

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
        # Four query heads if the layer has as many: the ranks of a verification, so that every schedule is available.
        group = min(self.heads // kv_heads, 4)
        few = min(kv_heads, 2 if group > 1 else 4)
        window = None if self.window is None else min(self.window, 16)
        rotary_dim = None if self.rotary_dim is None else 4
        changes = {"heads": few * group, "kv_heads": few, "head_dim": 8, "window": window, "rotary_dim": rotary_dim}
        return self.model_copy(update=changes)

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Softmax":
        return Softmax(self, dim, depth, eps)


class Softmax(Mixer):
    """Softmax attention layer, with a fused q, k, v projection."""

    head_counts = ("heads", "kv_heads")

    def __init__(self, config: SoftmaxConfig, dim: int, depth: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or dim // config.heads
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        self.rotary_dim = config.rotary_dim or self.head_dim
        self.mask = IntervalMask(window=config.window)
        self.qkv = Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        kind = config.qk_norm
        self.q_norm = None if kind is None else norm_layer(kind, self.head_dim, eps)
        self.k_norm = None if kind is None else norm_layer(kind, self.head_dim, eps)
        self.gate = Linear(dim, self.heads * self.head_dim) if config.output_gate else None
        self.out = Linear(self.heads * self.head_dim, dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Return the shares of the q, k, v projection, the output gate and the output projection."""
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shares = {"qkv.weight": Share(0, (width, kv_width, kv_width)), "out.weight": Share(1, (width,))}
        return shares | row_shares(self, "gate.weight")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`; rotary positions count from the start of each document."""
        if self.head_router is not None and cache is None:
            return self._mixture(self.head_router, x, layout)
        heads, attend = self.attention(x, layout, cache)
        if self.gate is not None:
            heads = heads * self.gate(x).sigmoid().view(heads.shape)
        if self.head_router is not None:
            router_input = x
            if self.head_router.by_norm:
                w_q = self.qkv.weight[: self.heads * self.head_dim]
                router_input = F.linear(x, w_q).unflatten(-1, (self.heads, -1))
            return project_output(heads, self.out, self.head_router(router_input, layout))
        out = self.out(heads.flatten(2))
        return Output(out, attend=attend) if self.attention_channels else out

    def attention(self, x: Tensor, layout: Layout, cache: Cache | None) -> tuple[Tensor, Attend]:
        """Return the heads' outputs, `[B, T_local, H, K]`, and their attention for other values."""
        scale = self.head_dim**-0.5
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = self._norm_and_rotate(q, k, self._rotary_table(layout, x))
        if cache is None:
            out = softmax_attention(q, k, v, layout, scale, mask=self.mask)
        else:
            out, k = cached_attention(q, k, v, layout, scale, self.mask, cache.kv)
        return out, partial(cached_score_attention, q, k, layout, scale, self.mask)

    def _rotary_table(self, layout: Layout, x: Tensor) -> Table:
        return layout_table(layout, x, self.rotary_dim, self.rope_theta, self.rope_scaling)

    def _norm_and_rotate(self, q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Apply QK-norm, if there is one, and rotary embedding to q and k `[B, T_local, ., K]`."""
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        return rotate(q, table), rotate(k, table)

    def _mixture(self, router: HeadRouter, x: Tensor, layout: Layout) -> Output:
        """Compute the layer for the active (token, head) pairs only, from the query to the output projection."""
        rows, group_size = self.heads * self.head_dim, self.heads // self.kv_heads
        w_q, w_kv = self.qkv.weight.split([rows, 2 * self.kv_heads * self.head_dim])
        k, v = F.linear(x, w_kv).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        if router.by_norm:
            q = F.linear(x, w_q).unflatten(-1, (-1, self.head_dim))
            routing = router(q, layout)
            routed = routing.chosen.shape[2]
            pairs = Pairs.of(routing.chosen, routed // group_size)
            q_shared, q_routed = q.split([self.heads - routed, routed], dim=2)
            q_pairs = pairs.gather(q_routed).transpose(1, 2)
        else:
            routing = router(x, layout)
            pairs = Pairs.of(routing.chosen, routing.chosen.shape[2] // group_size)
            w_shared, w_routed = split_routed(w_q, self.heads, routing)
            q_shared = F.linear(x, w_shared).unflatten(-1, (-1, self.head_dim))
            q_pairs = project_to_pairs(x, w_routed, routing.chosen, pairs.slots, pairs.index.numel())
            q_pairs = q_pairs.view(*pairs.index.shape, self.head_dim)
        table = self._rotary_table(layout, x)
        q_shared, k = self._norm_and_rotate(q_shared, k, table)
        q_pairs = q_pairs if self.q_norm is None else self.q_norm(q_pairs)
        q_pairs = rotate_rows(q_pairs, pairs.tokens, table)
        scale = self.head_dim**-0.5
        shared, routed_pairs = pair_attention(q_shared, q_pairs, k, v, pairs, layout, scale, mask=self.mask)
        if self.gate is not None:
            w_shared, w_routed = split_routed(self.gate.weight, self.heads, routing)
            gate_pairs = project_to_pairs(x, w_routed, routing.chosen, pairs.slots, pairs.index.numel())
            shared = shared * F.linear(x, w_shared).sigmoid().view(shared.shape)
            routed_pairs = routed_pairs * gate_pairs.sigmoid().view(routed_pairs.shape)
        return project_output_pairs(shared, routed_pairs, self.out, routing, pairs)

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> ScheduleChoice | None:
        """Describe the chosen schedule and its estimated costs, if the layout leaves the choice open ("auto")."""
        if layout.size == 1 or layout.attention != "auto":
            return None
        choices = []
        for prefix, heads, kv_heads in self._attentions():
            shape = AttentionShape(heads, kv_heads, self.head_dim, self.head_dim, dtype.itemsize, self.mask)
            choices.append((prefix, ScheduleChoice.of(rank_schedules(layout, shape))))
        return ScheduleChoice(
            "; ".join(prefix + choice.brief for prefix, choice in choices),
            "; ".join(prefix + choice.details for prefix, choice in choices),
        )

    def _attentions(self) -> Iterator[tuple[str, int, int]]:
        """Yield description, query heads and key/value heads of each attention that the layer runs."""
        if self.head_router is None:
            yield "", self.heads, self.kv_heads
            return
        group_size, shared = self.heads // self.kv_heads, self.head_router.shared // self.tp_axis.size
        if shared:
            yield "shared heads: ", shared, shared // group_size
        # The routed query heads of one key/value head are merged into one list of queries.
        routed = self.kv_heads - shared // group_size
        yield "routed heads: ", routed, routed

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of the projections and, per visible pair of tokens, a score and a weighted
        value; both again for a router that reuses the attention."""
        router = 0 if self.head_router is None else self.head_router.flops_per_token
        active = self.heads - self.inactive_heads
        # Routing by query norms needs the queries of all heads.
        saved_queries = 0 if self.head_router is not None and self.head_router.by_norm else self.inactive_heads
        dim, width = self.out.out_features, self.head_dim
        gates = 0 if self.gate is None else active
        projections = router + self.qkv.flops_per_token + 2 * dim * width * (active + gates - saved_queries)
        again = self.heads * (width + self.attention_channels) if self.attention_channels else 0
        return layout.local_length * projections + 2 * (2 * active * width + again) * score_elements(layout, self.mask)

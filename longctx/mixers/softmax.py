"""Causal softmax attention with grouped key/value heads and rotary positions, as in Llama."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from longctx.config import Integer
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.memory import Memory, attend, attend_to_scores
from longctx.model.layers import Linear, Output
from longctx.model.rotary import rotary_table, rotate
from longctx.parallel.attention import choose, softmax_attention
from longctx.parallel.choice import Shape, explained, fitting
from longctx.parallel.layout import Layout
from longctx.parallel.visibility import Reach, score_elements


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

    window: Integer | None = Field(default=None, gt=0)
    """A token sees the newest `window` tokens of its document, itself included; all earlier ones where absent."""

    def problems(self, dim: int) -> list[str]:
        found = head_dim_problems(dim, self.heads, self.head_dim)
        head_dim = self.head_dim or dim // self.heads
        if not found and head_dim % 2:
            found.append(f"head_dim: rotary positions turn pairs, so {head_dim} has to be even")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            found.append(f"kv_heads: {self.heads} query heads are not a multiple of {self.kv_heads} key/value heads")
        return found

    def schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]]:
        return "attention", fitting(self.heads, size, ulysses)

    def shrunk(self) -> "SoftmaxConfig":
        kv_heads = self.kv_heads or self.heads
        # As many query heads as a verification has ranks, where there are so many, so that all schedules fit.
        group = min(self.heads // kv_heads, 4)
        few = min(kv_heads, 2 if group > 1 else 4)
        window = None if self.window is None else min(self.window, 16)
        return SoftmaxConfig(heads=few * group, kv_heads=few, head_dim=8, rope_theta=self.rope_theta, window=window)

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Softmax":
        return Softmax(self, dim, depth)


class Softmax(Mixer):
    """The layer; q, k and v come from one projection."""

    def __init__(self, config: SoftmaxConfig, dim: int, depth: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or dim // config.heads
        self.rope_theta = config.rope_theta
        self.reach = Reach(window=config.window)
        self.qkv = Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, dim, scale=(2 * depth) ** -0.5)

    def mix(self, x: Tensor, layout: Layout, memory: Memory | None) -> Tensor | Output:
        """`[B, T_local, D]` to the same; positions count from the start of each document."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        table = rotary_table(layout.positions.to(x.device), self.head_dim, self.rope_theta)
        q, k = rotate(q, table), rotate(k, table)
        if memory is None:
            out = softmax_attention(q, k, v, layout, self.head_dim**-0.5, window=self.reach.window)
        else:
            out, k = attend(q, k, v, layout, self.head_dim**-0.5, self.reach.window, memory.keys)
        out = self.out(out.flatten(2))
        if not self.lent:
            return out
        return Output(out, attend=partial(attend_to_scores, q, k, layout, self.head_dim**-0.5, self.reach.window))

    def schedule(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """The schedule and its expected costs, where the layout leaves it to be chosen."""
        if layout.size == 1 or layout.attention != "auto":
            return None
        shape = Shape(self.heads, self.kv_heads, self.head_dim, self.head_dim, dtype.itemsize, self.reach)
        return explained(choose(layout, shape))

    def flops(self, layout: Layout) -> int:
        """Projections, and for each visible pair of tokens a score and a weighted value; both again for a router."""
        projections = self.qkv.flops_per_token + self.out.flops_per_token
        widths = 2 * self.head_dim + (self.head_dim + self.lent if self.lent else 0)
        return layout.local_length * projections + 2 * self.heads * widths * score_elements(layout, self.reach)

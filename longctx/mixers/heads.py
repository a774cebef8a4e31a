"""A mixture of heads in any mixer: a token reads the heads that it is routed to, and every head remembers all tokens.

Queries, output gates and the output projection are computed for the (token, head) pairs that are read; keys, values and
states for all. What a head gives a token that does not read it is zero, also for norms that run over all heads; then
heads are multiplied with the router's weights (`longctx.moe.head_router`), and projected.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Config, Integer
from longctx.kernels.recurrence import accumulation_dtype
from longctx.kernels.routed_linear import from_heads, to_heads
from longctx.model.layers import Linear, Output
from longctx.moe.head_router import BALANCE, HeadRouting, by_norm, learned
from longctx.parallel.layout import Layout


class HeadsMixConfig(Config):
    """`[model.heads]`: a mixture of heads (MoH): each token reads some of the heads of a mixer."""

    name: ClassVar[str] = "heads"

    mixers: tuple[str, ...] = Field(min_length=1)
    """The names of the mixers whose heads are routed, `["softmax", "lightning"]`."""
    active: Integer = Field(gt=0)
    """Routed heads that a token reads."""
    shared: Integer = Field(default=0, ge=0)
    """Heads that all tokens read, the first ones; in softmax layers whole groups that read one key/value head."""
    router: Literal["learned", "norm"] = "learned"
    """`learned`: from the layer's input. `norm`: the heads whose queries are largest, without parameters, to train a
    dense model on; in softmax layers."""
    balance: float = Field(default=BALANCE, ge=0)
    """Coefficient of the loss that keeps the load even."""

    def problems(self, mixer: str, heads: int, group: int) -> list[str]:
        """What does not fit a mixer with `heads` query heads, each `group` of which read one key/value head."""
        found = []
        if self.shared + self.active > heads:
            found.append(f"active: {self.shared} shared and {self.active} active of {heads} heads of {mixer}")
        if self.shared % group:
            found.append(f"shared: {self.shared} heads are not whole groups of {group}, which {mixer} has")
        if self.router == "norm" and mixer != "softmax":
            found.append(f"router: 'norm' is for softmax layers, and {mixer} is none; take 'learned'")
        return found

    def shrunk(self, heads: int, group: int) -> "HeadsMixConfig":
        """The same for a mixer with fewer heads."""
        shared = min(self.shared, (heads - 1) // group * group)
        return self.model_copy(update={"shared": shared, "active": min(self.active, max(1, (heads - shared) // 2))})


class HeadRouter(nn.Module):
    """Which heads a token reads; logits in float32 (higher where the input is)."""

    full_precision = True

    def __init__(self, config: HeadsMixConfig, dim: int, heads: int) -> None:
        super().__init__()
        self.shared, self.routed, self.active = config.shared, heads - config.shared, config.active
        self.balance, self.by_norm = config.balance, config.router == "norm"
        rows = heads + (2 if config.shared else 0)
        self.weight = None if self.by_norm else nn.Parameter(torch.empty(rows, dim))
        self.init_std = dim**-0.5

    def forward(self, x: Tensor, layout: Layout) -> HeadRouting:
        """The routing of x `[B, T_local, D]`, the layer's input, or the queries `[B, T_local, H, K]` of all heads."""
        if self.weight is None:
            return by_norm(x, self.shared, self.active, layout, self.balance)
        dtype = accumulation_dtype(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        routed, shared, kinds = logits.split([self.routed, self.shared, 2 if self.shared else 0], dim=-1)
        return learned(routed, shared, kinds, self.active, layout, self.balance)

    @property
    def flops_per_token(self) -> int:
        """Forward multiplications and additions for one token."""
        return 0 if self.weight is None else 2 * self.weight.numel()

    @property
    def unread(self) -> int:
        """Heads that a token does not read."""
        return self.routed - self.active


def read(x: Tensor, weight: Tensor, heads: int, routing: HeadRouting | None) -> Tensor:
    """`[B, T, H, K]`: x `[B, T, D]` by the rows of weight `[H K, D]`, for the heads that a token reads, else zero."""
    if routing is None:
        return F.linear(x, weight).unflatten(-1, (heads, -1))
    shared = heads - routing.chosen.shape[-1]
    width = len(weight) // heads
    routed = to_heads(x, weight[shared * width :].unflatten(0, (-1, width)), routing.chosen)
    if not shared:
        return routed
    return torch.cat([F.linear(x, weight[: shared * width]).unflatten(-1, (shared, width)), routed], dim=2)


def projected(
    x: Tensor, qkv: Linear, heads: int, kv_heads: int, routing: HeadRouting | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[B, T, H, K]`, k and v `[B, T, H_kv, K]` from one matrix, queries zero where a head is not read."""
    rows = len(qkv.weight) // (heads + 2 * kv_heads)
    if routing is None:
        q, k, v = qkv(x).unflatten(-1, (-1, rows)).split([heads, kv_heads, kv_heads], dim=2)
        return q, k, v
    for_q, for_kv = qkv.weight.split([heads * rows, 2 * kv_heads * rows])
    k, v = F.linear(x, for_kv).unflatten(-1, (-1, rows)).chunk(2, dim=2)
    return read(x, for_q, heads, routing), k, v


def emit(y: Tensor, out: Linear, routing: HeadRouting | None, *, weighted: bool = False) -> Tensor | Output:
    """`[B, T, D]`: the heads `[B, T, H, V]` times the router's weights, unless they are `weighted`, projected."""
    if routing is None:
        return out(y.flatten(2))
    if not weighted:
        y = y * routing.weights[..., None].to(y.dtype)
    shared = y.shape[2] - routing.chosen.shape[-1]
    width = y.shape[3]
    weights = out.weight[:, shared * width :].unflatten(1, (-1, width)).transpose(0, 1)
    projected = from_heads(y[:, :, shared:], weights, routing.chosen)
    if shared:
        projected = projected + F.linear(y[:, :, :shared].flatten(2), out.weight[:, : shared * width])
    return Output(projected, routing.report)


def hidden(x: Tensor, routing: HeadRouting | None) -> Tensor:
    """`[B, T, H, V]` with zeros for the heads that a token does not read."""
    if routing is None:
        return x
    shared = x.shape[2] - routing.chosen.shape[-1]
    there = torch.cat([routing.chosen.new_ones(*x.shape[:2], shared), routing.chosen], dim=-1)
    return torch.where(there[..., None], x, 0)

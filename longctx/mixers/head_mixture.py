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
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.routed.head_projection import project_from_heads, project_from_pairs, project_to_heads
from longctx.layers.basic import Linear
from longctx.layers.output import Output
from longctx.layers.router import exact_logits
from longctx.mixers.shares import Share
from longctx.moe.head_router import BALANCE, HeadRouting, by_norm, learned
from longctx.moe.heads import Pairs
from longctx.parallel.all_gather_channels import gather_channels
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis


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

    def attended(self, heads: int, group: int) -> dict[str, int]:
        """Heads that go through one softmax attention, which ranks may divide, of `heads` query heads, each `group` of
        which read one key/value head: what they are, in words, and how many."""
        found = {"shared heads": self.shared, "key/value heads of routed ones": (heads - self.shared) // group}
        return {words: count for words, count in found.items() if count}

    def shrunk(self, heads: int, group: int) -> "HeadsMixConfig":
        """The same for a mixer with fewer heads."""
        shared = min(self.shared, (heads - 1) // group * group)
        return self.model_copy(update={"shared": shared, "active": min(self.active, max(1, (heads - shared) // 2))})


class HeadRouter(nn.Module):
    """Which heads a token reads; logits in float32 (higher where the input is).

    Where ranks divide the heads between them, each has some of the shared and some of the routed ones; every rank
    routes all of them, alike, and reads its own.
    """

    full_precision = True

    def __init__(self, config: HeadsMixConfig, dim: int, heads: int) -> None:
        super().__init__()
        self.shared, self.routed, self.active = config.shared, heads - config.shared, config.active
        self.balance, self.by_norm = config.balance, config.router == "norm"
        rows = heads + (2 if config.shared else 0)
        self.weight = None if self.by_norm else nn.Parameter(torch.empty(rows, dim))
        self.init_std = dim**-0.5
        self.tp_axis = Axis()

    @property
    def kinds(self) -> tuple[int, ...]:
        """Heads of each kind, in the order in which they lie, of all ranks together."""
        return (self.shared, self.routed) if self.shared else (self.routed,)

    def forward(self, x: Tensor, layout: Layout) -> HeadRouting:
        """The routing of this rank's heads, from x `[B, T_local, D]`, the layer's input, or from their queries
        `[B, T_local, H, K]`. The report is of all heads, and its loss this rank's summand."""
        whole = self._routing(x, layout)
        if self.tp_axis.size == 1:
            return whole
        rank, size = self.tp_axis.rank, self.tp_axis.size
        return HeadRouting(
            Share(2, (self.routed,)).of(whole.chosen, rank, size),
            Share(2, self.kinds).of(whole.weights, rank, size),
            whole.report._replace(loss=whole.report.loss / size),
        )

    def _routing(self, x: Tensor, layout: Layout) -> HeadRouting:
        if self.weight is None:
            wide = x[:, :, self.shared // self.tp_axis.size :].to(accumulation_dtype(x.dtype))
            norms = gather_channels(wide.norm(dim=-1), self.tp_axis)
            return by_norm(norms, self.shared, self.active, layout, self.balance)
        logits = exact_logits(x, self.weight)
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
    of_shared, of_routed = split_routed(weight, heads, routing)
    routed = project_to_heads(x, of_routed, routing.chosen)
    if not len(of_shared):
        return routed
    return torch.cat([F.linear(x, of_shared).unflatten(-1, (-1, routed.shape[3])), routed], dim=2)


def split_routed(weight: Tensor, heads: int, routing: HeadRouting) -> tuple[Tensor, Tensor]:
    """weight `[H K, D]` as that of shared heads, `[S K, D]`, and of routed ones, `[E, K, D]`."""
    width, routed = len(weight) // heads, routing.chosen.shape[-1]
    of_shared, of_routed = weight.split([(heads - routed) * width, routed * width])
    return of_shared, of_routed.unflatten(0, (routed, width))


def emit(y: Tensor, out: Linear, routing: HeadRouting | None) -> Tensor | Output:
    """`[B, T, D]`: the heads `[B, T, H, V]` times the router's weights, projected."""
    if routing is None:
        return out(y.flatten(2))
    y = y * routing.weights[..., None].to(y.dtype)
    heads, routed = y.shape[2], routing.chosen.shape[-1]
    of_shared, of_routed = split_routed(out.weight.T, heads, routing)
    y_shared, y_routed = y.split([heads - routed, routed], dim=2)
    projected = project_from_heads(y_routed, of_routed.transpose(1, 2), routing.chosen)
    if heads > routed:
        projected = projected + F.linear(y_shared.flatten(2), of_shared.T)
    return Output(projected, routing.report)


def emit_pairs(shared: Tensor, routed: Tensor, out: Linear, routing: HeadRouting, pairs: Pairs) -> Output:
    """The same of shared heads `[B, T, S, V]` and of pairs `[B, G, N, V]`."""
    routed_heads = routing.chosen.shape[-1]
    of_shared, of_routed = split_routed(out.weight.T, shared.shape[2] + routed_heads, routing)
    for_shared, for_routed = routing.weights.split([shared.shape[2], routed_heads], dim=-1)
    rows = (routed * pairs.take(for_routed)[..., None].to(routed.dtype)).flatten(0, 2)
    projected = project_from_pairs(rows, of_routed.transpose(1, 2), routing.chosen, pairs.places)
    if shared.shape[2]:
        y = shared * for_shared[..., None].to(shared.dtype)
        projected = projected + F.linear(y.flatten(2), of_shared.T)
    return Output(projected, routing.report)


def hidden(x: Tensor, routing: HeadRouting | None) -> Tensor:
    """`[B, T, H, V]` with zeros for the heads that a token does not read."""
    if routing is None:
        return x
    shared = x.shape[2] - routing.chosen.shape[-1]
    there = torch.cat([routing.chosen.new_ones(*x.shape[:2], shared), routing.chosen], dim=-1)
    return torch.where(there[..., None], x, 0)

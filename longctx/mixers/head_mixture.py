"""Mixture of heads for any mixer: each token uses only the heads that it is routed to.

Queries, output gates and the output projection are computed for the active (token, head) pairs only; keys, values and
recurrent states for all. Inactive heads output zero, for norms over all heads as well. Heads are then multiplied by the
routing weights (`longctx.moe.head_router`) and projected.
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


class HeadMixtureConfig(Config):
    """`[model.heads]`: a mixture of heads (MoH), in which each token uses some of a mixer's heads."""

    name: ClassVar[str] = "heads"

    mixers: tuple[str, ...] = Field(min_length=1)
    """Names of the mixers whose heads are routed: `["softmax", "lightning"]`."""
    active: Integer = Field(gt=0)
    """Active routed heads per token (top-k)."""
    shared: Integer = Field(default=0, ge=0)
    """Number of shared heads, active for all tokens: the first ones. In softmax layers a multiple of the query heads
    per key/value head."""
    router: Literal["learned", "norm"] = "learned"
    """`learned`: a projection of the layer's input. `norm`: the heads with the largest query norms, without parameters,
    for continued training of a dense model; softmax layers only."""
    balance: float = Field(default=BALANCE, ge=0)
    """Coefficient of the load-balancing loss."""

    def problems(self, mixer: str, heads: int, group: int) -> list[str]:
        """Return the problems with a mixer of `heads` query heads, `group` per key/value head, each with its key."""
        problems = []
        if self.shared + self.active > heads:
            problems.append(f"active: {self.shared} shared and {self.active} active of {heads} heads of {mixer}")
        if group and self.shared % group:  # 0: more key/value heads than heads, which the mixer refuses
            problems.append(f"shared: {self.shared} heads are not a multiple of {group}, {mixer}'s heads per kv head")
        if self.router == "norm" and mixer != "softmax":
            problems.append(f"router: 'norm' supports only softmax layers, not {mixer}; use 'learned'")
        return problems

    def attention_head_counts(self, heads: int, group: int) -> dict[str, int]:
        """Return the head count of each softmax attention that ranks may split, by description.

        The mixer has `heads` query heads, `group` per key/value head.
        """
        counts = {"shared heads": self.shared, "key/value heads of routed ones": (heads - self.shared) // group}
        return {kind: count for kind, count in counts.items() if count}

    def shrunk(self, heads: int, group: int) -> "HeadMixtureConfig":
        """Return the configuration for a mixer with fewer heads."""
        shared = min(self.shared, (heads - 1) // group * group)
        return self.model_copy(update={"shared": shared, "active": min(self.active, max(1, (heads - shared) // 2))})


class HeadRouter(nn.Module):
    """Router of a mixture of heads, with logits in float32 (float64 if the input is).

    Under tensor parallelism, each rank has some of the shared and some of the routed heads; every rank computes the
    same routing of all heads and keeps its own part.
    """

    full_precision = True

    def __init__(self, config: HeadMixtureConfig, dim: int, heads: int) -> None:
        super().__init__()
        self.shared, self.routed, self.active = config.shared, heads - config.shared, config.active
        self.balance, self.by_norm = config.balance, config.router == "norm"
        rows = heads + (2 if config.shared else 0)
        self.weight = None if self.by_norm else nn.Parameter(torch.empty(rows, dim))
        self.init_std = dim**-0.5
        self.tp_axis = Axis()

    @property
    def kinds(self) -> tuple[int, ...]:
        """Number of heads of each kind over all ranks, in their order: shared, routed."""
        return (self.shared, self.routed) if self.shared else (self.routed,)

    def forward(self, x: Tensor, layout: Layout) -> HeadRouting:
        """Route tokens to this rank's heads.

        x is the layer's input `[B, T_local, D]` or, for the router `norm`, the queries `[B, T_local, H, K]` of this
        rank's heads. The report covers all heads; its loss is this rank's part.
        """
        routing = self._routing(x, layout)
        if self.tp_axis.size == 1:
            return routing
        rank, size = self.tp_axis.rank, self.tp_axis.size
        return HeadRouting(
            Share(2, (self.routed,)).shard(routing.chosen, rank, size),
            Share(2, self.kinds).shard(routing.weights, rank, size),
            routing.report._replace(loss=routing.report.loss / size),
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
    def inactive_heads(self) -> int:
        """Number of inactive heads per token."""
        return self.routed - self.active


def project_active(x: Tensor, weight: Tensor, heads: int, routing: HeadRouting | None) -> Tensor:
    """Project x `[B, T, D]` by weight `[H K, D]` to the active heads: `[B, T, H, K]`, zero for inactive ones."""
    if routing is None:
        return F.linear(x, weight).unflatten(-1, (heads, -1))
    w_shared, w_routed = split_routed(weight, heads, routing)
    routed = project_to_heads(x, w_routed, routing.chosen)
    if not len(w_shared):
        return routed
    return torch.cat([F.linear(x, w_shared).unflatten(-1, (-1, routed.shape[3])), routed], dim=2)


def split_routed(weight: Tensor, heads: int, routing: HeadRouting) -> tuple[Tensor, Tensor]:
    """Split weight `[H K, D]` into that of the shared heads, `[S K, D]`, and of the routed heads, `[E, K, D]`."""
    width, routed = len(weight) // heads, routing.chosen.shape[-1]
    w_shared, w_routed = weight.split([(heads - routed) * width, routed * width])
    return w_shared, w_routed.unflatten(0, (routed, width))


def project_output(y: Tensor, out: Linear, routing: HeadRouting | None) -> Tensor | Output:
    """Apply the routing weights to the heads y `[B, T, H, V]` and the output projection: `[B, T, D]`."""
    if routing is None:
        return out(y.flatten(2))
    y = y * routing.weights[..., None].to(y.dtype)
    heads, routed = y.shape[2], routing.chosen.shape[-1]
    w_shared, w_routed = split_routed(out.weight.T, heads, routing)
    y_shared, y_routed = y.split([heads - routed, routed], dim=2)
    projected = project_from_heads(y_routed, w_routed.transpose(1, 2), routing.chosen)
    if heads > routed:
        projected = projected + F.linear(y_shared.flatten(2), w_shared.T)
    return Output(projected, routing.report)


def project_output_pairs(shared: Tensor, routed: Tensor, out: Linear, routing: HeadRouting, pairs: Pairs) -> Output:
    """Compute `project_output` for shared heads `[B, T, S, V]` and the pairs of routed heads `[B, G, N, V]`."""
    routed_heads = routing.chosen.shape[-1]
    w_shared, w_routed = split_routed(out.weight.T, shared.shape[2] + routed_heads, routing)
    shared_factors, routed_factors = routing.weights.split([shared.shape[2], routed_heads], dim=-1)
    rows = (routed * pairs.take(routed_factors)[..., None].to(routed.dtype)).flatten(0, 2)
    projected = project_from_pairs(rows, w_routed.transpose(1, 2), routing.chosen, pairs.slots)
    if shared.shape[2]:
        y = shared * shared_factors[..., None].to(shared.dtype)
        projected = projected + F.linear(y.flatten(2), w_shared.T)
    return Output(projected, routing.report)


def zero_inactive(x: Tensor, routing: HeadRouting | None) -> Tensor:
    """Set the inactive heads of x `[B, T, H, V]` to zero."""
    if routing is None:
        return x
    shared = x.shape[2] - routing.chosen.shape[-1]
    active = torch.cat([routing.chosen.new_ones(*x.shape[:2], shared), routing.chosen], dim=-1)
    return torch.where(active[..., None], x, 0)

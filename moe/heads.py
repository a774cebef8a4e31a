"""Mixture-of-heads attention (MoH): softmax attention computed for the routed (token, head) pairs only.

The published form (Jin et al. 2024) computes all heads of all tokens and multiplies by a mask; here the scores and
weighted values of inactive pairs are not computed. All keys and values are, since any later token may attend to them.

The query heads of one key/value head are merged into one list of pairs, sorted by token: their queries differ, the keys
visible at a token do not. Such a list is the input of `longctx.parallel.attention.routed_attention`, which runs over
ranks with any schedule. `longctx.kernels.routed.head_projection` projects queries and outputs for the same pairs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longctx.kernels.attention.block import CAUSAL_MASK, Mask
from longctx.moe.head_router import HeadRouting
from longctx.parallel.attention.api import routed_attention, softmax_attention
from longctx.parallel.layout import Layout


@dataclass(frozen=True)
class Pairs:
    """The routed (token, head) pairs, as one list per key/value head (G of them), in token order."""

    index: Tensor
    """`[B, G, N]` int64: token * S + the head's number among the S query heads of its key/value head. Lists of fewer
    than N pairs are padded with -1 at the front."""
    group_size: int
    """S: routed query heads per key/value head."""
    length: int
    """T."""

    @classmethod
    def of(cls, chosen: Tensor, groups: int) -> "Pairs":
        """List the pairs of chosen `[B, T, E]` (bool), with E = G x S: S adjacent heads share one key/value head.

        Synchronizes with the device, since the number of pairs determines shapes.
        """
        batch, length, heads = chosen.shape
        group_size = heads // groups
        by_group = chosen.unflatten(2, (groups, group_size)).transpose(1, 2).flatten(2)
        counts = by_group.sum(dim=2)
        longest = int(counts.max()) if counts.numel() else 0
        index = torch.full((batch, groups, longest), -1, dtype=torch.int64, device=chosen.device)
        sequence, group, flat = by_group.nonzero(as_tuple=True)
        # `nonzero` lists the pairs group by group: each pair's number in its group, moved to the end of its row.
        begins = counts.flatten().cumsum(0).view_as(counts) - counts
        numbers = torch.arange(len(flat), device=chosen.device) - begins[sequence, group]
        index[sequence, group, longest - counts[sequence, group] + numbers] = flat
        return cls(index, group_size, length)

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each pair, `[B, G, N]`; -1 for padding."""
        return torch.div(self.index, self.group_size, rounding_mode="floor")

    @cached_property
    def _flat_index(self) -> tuple[Tensor, Tensor]:
        """Which entries are pairs, `[B, G, N]` bool, and the indices of these in a flat `[B, T, E]`."""
        valid = self.index >= 0
        batch, groups, _ = self.index.shape
        sequence, group = (torch.arange(n, device=self.index.device) for n in (batch, groups))
        token, head = self.tokens, self.index % self.group_size
        flat = ((sequence[:, None, None] * self.length + token) * groups + group[:, None]) * self.group_size + head
        return valid, flat[valid]

    @cached_property
    def slots(self) -> Tensor:
        """The index of each pair in the flat `[B, G, N]`: `[B, T, E]` int64, 0 for what is no pair."""
        valid, flat = self._flat_index
        batch, groups, _ = self.index.shape
        slots = torch.zeros(batch, self.length, groups * self.group_size, dtype=torch.int64, device=self.index.device)
        slots.view(-1)[flat] = valid.flatten().nonzero()[:, 0]
        return slots

    def take(self, x: Tensor) -> Tensor:
        """Gather one number per pair: `[B, T, E]` to `[B, G, N]`, zero for padding; differentiable."""
        valid, flat = self._flat_index
        return x.new_zeros(valid.shape).index_put((valid,), x.flatten().index_select(0, flat))

    def gather(self, x: Tensor) -> Tensor:
        """Gather one vector per pair: `[B, T, E, D]` to `[B, N, G, D]`, zero for padding; differentiable."""
        valid, flat = self._flat_index
        out = x.new_zeros(*valid.shape, x.shape[3])
        out[valid] = x.flatten(0, 2).index_select(0, flat)
        return out.transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """Invert `gather`: `[B, N, G, D]` to `[B, T, E, D]`, zero for what is no pair; differentiable."""
        valid, flat = self._flat_index
        batch, _, groups, dim = x.shape
        out = x.new_zeros(batch * self.length * groups * self.group_size, dim)
        out = out.index_copy(0, flat, x.transpose(1, 2)[valid])
        return out.view(batch, self.length, groups * self.group_size, dim)


def mixture_of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: HeadRouting,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    mask: Mask = CAUSAL_MASK,
) -> Tensor:
    """Causal softmax attention over each token's active heads, times their routing weights: `[B, T_local, H, V]`.

    Shapes: q `[B, T_local, H, K]`, k `[B, T_local, H_kv, K]`, v `[B, T_local, H_kv, V]`, with rotary positions applied.
    `routing` is that of H heads, of which the first are shared: a multiple of H / H_kv, so that they use whole
    key/value heads. Inactive heads output zero. Equal to `softmax_attention` times `routing.weights`; differentiable in
    q, k, v and the weights. Other arguments as in `softmax_attention`. Raises ValueError if shapes do not match.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    shared = heads - routing.chosen.shape[2]
    group_size = heads // kv_heads
    if heads % kv_heads or shared % group_size:
        raise ValueError(
            f"mixture of heads: {heads} query heads, of which {shared} are shared, over {kv_heads} key/value heads: "
            f"expected a multiple of {kv_heads} query heads, and shared heads in whole groups of {group_size}"
        )
    pairs = Pairs.of(routing.chosen, kv_heads - shared // group_size)
    q_shared, q_routed = q.split([shared, heads - shared], dim=2)
    queries = pairs.gather(q_routed).transpose(1, 2)
    out_shared, out = pair_attention(q_shared, queries, k, v, pairs, layout, scale, schedule=schedule, mask=mask)
    parts = [out_shared, pairs.scatter(out.transpose(1, 2))]
    return torch.cat(parts, dim=2) * routing.weights[..., None].to(q.dtype)


def pair_attention(
    shared: Tensor,
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Pairs,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    mask: Mask = CAUSAL_MASK,
) -> tuple[Tensor, Tensor]:
    """Compute the two parts of `mixture_of_heads` without routing weights: `[B, T_local, S, V]` and `[B, G, N, V]`.

    Shapes: shared `[B, T_local, S, K]`, the queries of the shared heads (S may be 0); queries `[B, G, N, K]`, those of
    the pairs, which use the last G key/value heads of k and v.
    """
    groups = queries.shape[1]
    shared_kv = k.shape[2] - groups
    (k_shared, k_routed), (v_shared, v_routed) = (x.split([shared_kv, groups], dim=2) for x in (k, v))
    if shared_kv:
        out = softmax_attention(shared, k_shared, v_shared, layout, scale, schedule=schedule, mask=mask)
    else:
        out = v.new_empty(*shared.shape[:3], v.shape[3])
    routed = routed_attention(
        queries.transpose(1, 2), k_routed, v_routed, pairs.tokens, layout, scale, schedule=schedule, mask=mask
    )
    return out, routed.transpose(1, 2)

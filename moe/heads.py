"""Softmax attention with a mixture of heads: only the (token, head) pairs that were routed are computed.

The published form (Jin et al. 2024) computes all heads of all tokens and multiplies with a mask; here the scores and
weighted values of a pair that no token reads do not exist. All keys and values do: any token may read them.

The query heads that read one key/value head are sorted together, by token: their queries differ, the keys that they
see at a token do not. So the pairs of a key/value head are one list of queries with places in the sequence, as long as
its heads are read together, and what `longctx.parallel.attention.routed_attention` takes, over ranks by any schedule.
Queries and outputs are projected by `longctx.kernels.routed.head_projection`, for the same pairs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longctx.moe.head_router import HeadRouting
from longctx.parallel.attention.api import routed_attention, softmax_attention
from longctx.parallel.layout import Layout


@dataclass(frozen=True)
class Pairs:
    """The pairs of a token and a routed head, by the G key/value heads that they read, in order of tokens."""

    index: Tensor
    """`[B, G, N]` int64: token times S plus the head's number among the S that read one key/value head; -1, first,
    where a key/value head has fewer than N pairs."""
    share: int
    """S."""
    length: int
    """T."""

    @classmethod
    def of(cls, chosen: Tensor, groups: int) -> "Pairs":
        """chosen `[B, T, E]` bool, E = G x S heads of which each S neighbours read one key/value head.

        Waits for the device: how many pairs there are decides the shapes of what follows.
        """
        batch, length, heads = chosen.shape
        share = heads // groups
        by_group = chosen.unflatten(2, (groups, share)).transpose(1, 2).flatten(2)
        counts = by_group.sum(dim=2)
        most = int(counts.max()) if counts.numel() else 0
        index = torch.full((batch, groups, most), -1, dtype=torch.int64, device=chosen.device)
        sequence, group, flat = by_group.nonzero(as_tuple=True)
        # The pairs come group by group: where each group's begin among all, and in its row of `index`.
        begins = counts.flatten().cumsum(0).view_as(counts) - counts
        numbers = torch.arange(len(flat), device=chosen.device) - begins[sequence, group]
        index[sequence, group, most - counts[sequence, group] + numbers] = flat
        return cls(index, share, length)

    @cached_property
    def rows(self) -> Tensor:
        """`[B, G, N]`: the token of each pair, -1 where there is none."""
        return torch.div(self.index, self.share, rounding_mode="floor")

    @cached_property
    def _at(self) -> tuple[Tensor, Tensor]:
        """Which entries are pairs, `[B, G, N]` bool, and where these lie in a flat `[B, T, E]`."""
        there = self.index >= 0
        batch, groups, _ = self.index.shape
        sequence, group = (torch.arange(n, device=self.index.device) for n in (batch, groups))
        token, head = self.rows, self.index % self.share
        place = ((sequence[:, None, None] * self.length + token) * groups + group[:, None]) * self.share + head
        return there, place[there]

    @cached_property
    def places(self) -> Tensor:
        """`[B, T, E]` int64: where each pair lies in the flat `[B, G, N]`; 0 for what is none."""
        there, place = self._at
        batch, groups, _ = self.index.shape
        rows = torch.zeros(batch, self.length, groups * self.share, dtype=torch.int64, device=self.index.device)
        rows.view(-1)[place] = there.flatten().nonzero()[:, 0]
        return rows

    def take(self, x: Tensor) -> Tensor:
        """`[B, T, E]` to `[B, G, N]`, a number for each pair, zero where there is none; differentiable."""
        there, place = self._at
        return x.new_zeros(there.shape).index_put((there,), x.flatten().index_select(0, place))

    def gather(self, x: Tensor) -> Tensor:
        """`[B, T, E, D]` to `[B, N, G, D]`, zero where there is no pair; differentiable."""
        there, place = self._at
        out = x.new_zeros(*there.shape, x.shape[3])
        out[there] = x.flatten(0, 2).index_select(0, place)
        return out.transpose(1, 2)

    def scatter(self, x: Tensor) -> Tensor:
        """`[B, N, G, D]` to `[B, T, E, D]`, zero where no pair is; differentiable."""
        there, place = self._at
        batch, _, groups, dim = x.shape
        flat = x.new_zeros(batch * self.length * groups * self.share, dim)
        flat = flat.index_copy(0, place, x.transpose(1, 2)[there])
        return flat.view(batch, self.length, groups * self.share, dim)


def mixture_of_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: HeadRouting,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal softmax attention of the heads that each token reads, times their weights: `[B, T_local, H, V]`.

    Shapes: q `[B, T_local, H, K]`, k `[B, T_local, H_kv, K]`, v `[B, T_local, H_kv, V]`, with rotary positions applied;
    routing for H heads, of which the first ones are read by all tokens: as many as read whole key/value heads (a
    multiple of H / H_kv). A head that a token does not read gives zero. Equal to `softmax_attention` times
    `routing.weights`; differentiable in q, k, v and the weights. The rest as in `softmax_attention`. Raises ValueError
    where shapes do not fit.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    shared = heads - routing.chosen.shape[2]
    share = heads // kv_heads
    if heads % kv_heads or shared % share:
        raise ValueError(
            f"mixture of heads: {heads} query heads, of which {shared} are shared, over {kv_heads} key/value heads: "
            f"expected a multiple of these, and shared heads in whole groups of {share}"
        )
    pairs = Pairs.of(routing.chosen, kv_heads - shared // share)
    of_shared, of_routed = q.split([shared, heads - shared], dim=2)
    queries = pairs.gather(of_routed).transpose(1, 2)
    out_shared, out = attend_pairs(of_shared, queries, k, v, pairs, layout, scale, schedule=schedule, window=window)
    parts = [out_shared, pairs.scatter(out.transpose(1, 2))]
    return torch.cat(parts, dim=2) * routing.weights[..., None].to(q.dtype)


def attend_pairs(
    shared: Tensor,
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: Pairs,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The two parts of `mixture_of_heads`, without weights: `[B, T_local, S, V]` and `[B, G, N, V]`.

    Shapes: shared `[B, T_local, S, K]`, the queries of shared heads, perhaps none; queries `[B, G, N, K]`, those of the
    pairs, which read the last G of the key/value heads of k and v.
    """
    groups = queries.shape[1]
    first = k.shape[2] - groups
    (k_shared, k_routed), (v_shared, v_routed) = (x.split([first, groups], dim=2) for x in (k, v))
    if first:
        out = softmax_attention(shared, k_shared, v_shared, layout, scale, schedule=schedule, window=window)
    else:
        out = v.new_empty(*shared.shape[:3], v.shape[3])
    routed = routed_attention(
        queries.transpose(1, 2), k_routed, v_routed, pairs.rows, layout, scale, schedule=schedule, window=window
    )
    return out, routed.transpose(1, 2)

"""Softmax attention over the ranks of a sequence: any schedule, any layout, the same numbers.

| schedule | keys and values | elements that a rank receives, forward |
|---|---|---|
| `all-gather` | of all ranks, a slice of heads at a time (`all_gather.py`) | (W-1) T_local H_kv (K+V) |
| `ring` | of one rank after another, only visible rows (`ring.py`) | the visible ones of these |
| `ulysses` | of all tokens, for some heads (`ulysses.py`) | (W-1)/W T_local (H K + H_kv (K+V) + H V) |
| `ulysses-ring`, `ulysses-all-gather` | Ulysses within groups, the other between them (2-D) | of both |

The layout (documents, padding) and the mask decide what a query sees. Plans are made once per layout and cached in it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.kernels.attention.block import CAUSAL_MASK, Mask
from longctx.parallel.attention.all_gather import AllGatherSchedule
from longctx.parallel.attention.cost_model import AttentionShape, ScheduleEstimate, estimates
from longctx.parallel.attention.ring import RingSchedule
from longctx.parallel.attention.ulysses import HeadPartition, gather_heads, scatter_heads, scatter_rows_of
from longctx.parallel.attention.visibility import KVOwners
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Grid

BETWEEN_OWNERS: dict[str, type[RingSchedule] | type[AllGatherSchedule]] = {
    "all-gather": AllGatherSchedule,
    "ring": RingSchedule,
    "ulysses": RingSchedule,
    "ulysses-ring": RingSchedule,
    "ulysses-all-gather": AllGatherSchedule,
}
"""By name of a schedule, the one between KV owners; with Ulysses over all ranks there is one owner, and no exchange."""


SCHEDULES = (*BETWEEN_OWNERS, "auto")


def rank_schedules(layout: Layout, shape: AttentionShape) -> list[ScheduleEstimate]:
    """Estimate the time of each schedule for a layer, the fastest first; cached in the layout."""
    ranked: list[ScheduleEstimate] = layout.cached(("choice", shape), lambda: estimates(layout, shape))
    return ranked


class Schedule(Protocol):
    """A schedule between KV owners, planned for one of them; tensors are of its rows."""

    def routed(self, places: Tensor) -> "Schedule":
        """Return the schedule for each head's own queries, at places `[B, H, Tq]` of the sequence."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return out in q's dtype and lse."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv."""


class _ScheduledAttention(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float) -> Tensor:
        out, lse = schedule.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule, ctx.scale = schedule, scale
        return out

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.schedule.backward(grads[0], *ctx.saved_tensors, ctx.scale), None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float) -> Tensor:
    out: Tensor = _ScheduledAttention.apply(q, k, v, schedule, scale)  # type: ignore[no-untyped-call]
    return out


class AttentionPlan:
    """A named schedule planned on a layout, for this rank: its Ulysses group, and the schedule between KV owners."""

    def __init__(self, layout: Layout, name: str, mask: Mask, device: torch.device) -> None:
        self.grid = _grid(layout, name)
        self.piece_length = layout.piece_length
        ulysses = self.grid.ulysses
        self.piece_starts = torch.tensor([n * self.piece_length for n in layout.pieces_of(layout.rank)], device=device)
        """The place of the first row of each of this rank's pieces in the sequence."""
        first = layout.rank - layout.rank % ulysses
        gathered = [number for rank in range(first, first + ulysses) for number in layout.pieces_of(rank)]
        order = sorted(range(len(gathered)), key=gathered.__getitem__)
        self._order = None if order == list(range(len(order))) else torch.tensor(order, device=device)
        self._inverse = None if self._order is None else self._order.argsort()
        owners, index = KVOwners.of(layout, ulysses, mask), layout.rank // ulysses
        self.schedule: Schedule = BETWEEN_OWNERS[name].of(owners, index, self.grid.ring_group, device)

    def in_sequence(self, x: Tensor) -> Tensor:
        """Put the rows of an Ulysses group in sequence order, from the order of its ranks."""
        return self._pieces(x, self._order)

    def by_rank(self, x: Tensor) -> Tensor:
        """Put the rows of an Ulysses group in the order of its ranks: the inverse of `in_sequence`."""
        return self._pieces(x, self._inverse)

    def _pieces(self, x: Tensor, order: Tensor | None) -> Tensor:
        return x if order is None else x.unflatten(1, (-1, self.piece_length))[:, order].flatten(1, 2)


def _grid(layout: Layout, schedule: str) -> Grid:
    """Divide the ranks into the Ulysses groups and rings of a schedule."""
    if layout.size == 1:
        return Grid(1, None, None)
    if schedule in ("ring", "all-gather"):
        return Grid(1, None, layout.comm_group)
    if schedule == "ulysses":
        return Grid(layout.size, layout.comm_group, None)
    if layout.grid is None:
        raise ValueError(
            f"attention: schedule {schedule!r} needs a mesh whose cp axis is ulysses x ring; this layout has its "
            f"{layout.size} ranks in one group"
        )
    return layout.grid


def check_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, schedule: str) -> None:
    """Raise ValueError where shapes, layout and schedule do not match."""
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and k.shape[3] == q.shape[3]
    if not fits or k.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected "
            "[B, T, H, K], [B, T, H_kv, K] and [B, T, H_kv, V]"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if q.shape[1] != layout.local_length:
        raise ValueError(f"attention: {q.shape[1]} tokens, but the layout gives this rank {layout.local_length}")
    if layout.past_tokens:
        raise ValueError(
            f"attention: the layout continues a document after {layout.past_tokens} past tokens, whose keys are not "
            "here; use a KV cache (longctx.layers.cache.cached_attention)"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"attention: no schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")


def _plan(q: Tensor, k: Tensor, v: Tensor, layout: Layout, schedule: str | None, mask: Mask) -> AttentionPlan:
    """Plan a schedule, the layout's where None; once per layout."""
    name, device = schedule or layout.attention, q.device
    if name == "auto":
        shape = AttentionShape(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.element_size(), mask)
        name = rank_schedules(layout, shape)[0].schedule
    key = ("attention", name, mask, device)
    plan: AttentionPlan = layout.cached(key, lambda: AttentionPlan(layout, name, mask, device))
    return plan


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    mask: Mask = CAUSAL_MASK,
) -> Tensor:
    """Compute softmax attention within documents, `[B, T_local, H, V]`; the output of padding rows is zero.

    Shapes: q `[B, T_local, H, K]`, k `[B, T_local, H_kv, K]`, v `[B, T_local, H_kv, V]`, H a multiple of H_kv; rotary
    positions are already applied. `mask`: which keys of its document a query sees. `schedule`: one of SCHEDULES, the
    layout's where None. Differentiable in q, k and v; every rank of the layout must call it. Raises ValueError where an
    argument is invalid.
    """
    check_attention(q, k, v, layout, schedule or layout.attention)
    plan = _plan(q, k, v, layout, schedule, mask)
    ulysses = plan.grid.ulysses_group
    if ulysses is None:
        return _attend(q, k, v, plan.schedule, scale)
    heads = HeadPartition(q.shape[2], k.shape[2], plan.grid.ulysses)
    q, k, v = map(plan.in_sequence, scatter_heads(q, k, v, heads, ulysses))
    out = _attend(q, k, v, plan.schedule, scale)
    return gather_heads(plan.by_rank(out), heads, ulysses)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    mask: Mask = CAUSAL_MASK,
) -> Tensor:
    """Compute softmax attention for some queries of each head, `[B, N, H, V]`: the rows of `softmax_attention` there.

    Shapes: q `[B, N, H, K]`, the n-th query of each head; k `[B, T_local, H, K]`, v `[B, T_local, H, V]`; rows
    `[B, H, N]`, the row among this rank's tokens that each query belongs to, ascending, of which several may be equal;
    -1, first, for no query, whose output is zero. N may differ between ranks. The rest as in `softmax_attention`, with
    Ulysses over divisors of H; keys and values cost the same bytes as there, queries and outputs only those routed.
    Differentiable in q, k and v; every rank of the layout must call it.
    """
    fits = q.dim() == k.dim() == 4 and rows.shape == (q.shape[0], q.shape[2], q.shape[1]) and q.shape[2] == k.shape[2]
    if not fits:
        raise ValueError(
            f"routed attention: q {tuple(q.shape)}, k {tuple(k.shape)} and rows {tuple(rows.shape)} do not fit: "
            "expected [B, N, H, K], [B, T, H, K] and [B, H, N]"
        )
    check_attention(k, k, v, layout, schedule or layout.attention)
    plan = _plan(k, k, v, layout, schedule, mask)
    places = plan.piece_starts[rows.clamp_min(0) // plan.piece_length] + rows % plan.piece_length
    places = torch.where(rows < 0, rows, places)
    ulysses = plan.grid.ulysses_group
    if ulysses is None:
        return _attend(q, k, v, plan.schedule.routed(places), scale)
    # Every rank of the group sends equally many: padded in front with rows that are no queries.
    counts = all_gather(torch.full((1,), q.shape[1], device=q.device), ulysses).wait()
    more = int(counts.max()) - q.shape[1]
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, more, 0))
    places = torch.nn.functional.pad(places, (more, 0), value=-1)
    heads = HeadPartition(q.shape[2], k.shape[2], plan.grid.ulysses)
    q, k, v = scatter_heads(q, k, v, heads, ulysses)
    places = scatter_rows_of(places.transpose(1, 2)[..., None], heads.size, ulysses)[..., 0].transpose(1, 2)
    places, order = places.sort(dim=2, stable=True)
    order = order.transpose(1, 2)[..., None]
    q = q.gather(1, order.expand(-1, -1, -1, q.shape[3]))
    out = _attend(q, plan.in_sequence(k), plan.in_sequence(v), plan.schedule.routed(places), scale)
    inverse = order.argsort(dim=1).expand(-1, -1, -1, out.shape[3])
    return gather_heads(out.gather(1, inverse), heads, ulysses)[:, more:]

"""Softmax attention over a sequence that lies over ranks, by any schedule, under any layout: the same numbers.

| schedule | keys and values | bytes that a rank receives, forward |
|---|---|---|
| `all-gather` | of all ranks, a slice of heads at a time (`all_gather.py`) | (W-1) T_r H_kv (K+V) |
| `ring` | of each rank that holds some that are seen, in turn (`ring.py`) | what is seen of them |
| `ulysses` | of all tokens for some heads (`ulysses.py`) | (W-1)/W T_r (H K + H_kv (K+V) + H V) |
| `ulysses-ring`, `ulysses-all-gather` | Ulysses among neighbours, the other between groups | of both |

What a query sees is in the layout (documents, padding) and in `causal` and `window`. Plans are made once per layout and
kept with it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.parallel.attention.all_gather import Gathered
from longctx.parallel.attention.cost_model import AttentionShape, Estimate, estimates
from longctx.parallel.attention.ring import Ring, plan
from longctx.parallel.attention.ulysses import HeadPartition, gather_heads, scatter_heads, scatter_rows_of
from longctx.parallel.attention.visibility import KVOwners, Reach
from longctx.parallel.autograd import rank_backward, rank_forward
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Grid

ACROSS = {
    "all-gather": "all-gather",
    "ring": "ring",
    "ulysses": "ring",
    "ulysses-ring": "ring",
    "ulysses-all-gather": "all-gather",
}
"""The schedules, each with what it does between holders; Ulysses alone has one holder, and nothing to do."""


SCHEDULES = (*ACROSS, "auto")


def rank_schedules(layout: Layout, shape: AttentionShape) -> list[Estimate]:
    """What each schedule is expected to take for a layer, the fastest first; kept with the layout."""
    found: list[Estimate] = layout.cached(("choice", shape), lambda: estimates(layout, shape))
    return found


class _Across(Protocol):
    """A schedule between holders."""

    def routed(self, places: Tensor) -> "_Across": ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _Attention(torch.autograd.Function):
    @staticmethod
    @rank_forward
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, across: _Across, scale: float) -> Tensor:
        out, lse = across.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.across, ctx.scale = across, scale
        return out

    @staticmethod
    @rank_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.across.backward(grads[0], *ctx.saved_tensors, ctx.scale), None, None


class _Plan:
    """A schedule on a layout: the holders, this rank's among them, and what goes on between them."""

    def __init__(self, layout: Layout, schedule: str, reach: Reach, device: torch.device) -> None:
        grid = _grid(layout, schedule)
        first = layout.rank - layout.rank % grid.ulysses
        members = range(first, first + grid.ulysses)
        self.grid = grid
        self.step = layout.piece_length
        arriving = [number for rank in members for number in layout.numbers(rank)]
        order = sorted(range(len(arriving)), key=arriving.__getitem__)
        self.order = None if order == list(range(len(order))) else torch.tensor(order, device=device)
        self.back = None if self.order is None else self.order.argsort()
        owners, index = KVOwners.of(layout, grid.ulysses, reach), layout.rank // grid.ulysses
        self.begins = torch.tensor([n * self.step for n in layout.numbers(layout.rank)], device=device)
        """Where each of this rank's pieces begins in the sequence."""
        self.across: _Across
        if ACROSS[schedule] == "ring":
            self.across = Ring(owners, plan(owners, index, device), index, grid.ring_group)
        else:
            self.across = Gathered(owners, index, grid.ring_group, device)

    def sorted(self, x: Tensor) -> Tensor:
        """The rows of an Ulysses group in sequence order, from the order of its ranks."""
        return x if self.order is None else x.unflatten(1, (-1, self.step))[:, self.order].flatten(1, 2)

    def unsorted(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.back is None else x.unflatten(1, (-1, self.step))[:, self.back].flatten(1, 2)


def _grid(layout: Layout, schedule: str) -> Grid:
    """How a schedule divides the ranks into Ulysses groups and rings."""
    if layout.size == 1:
        return Grid(1, None, None)
    if schedule in ("ring", "all-gather"):
        return Grid(1, None, layout.peers)
    if schedule == "ulysses":
        return Grid(layout.size, layout.peers, None)
    if layout.grid is None:
        raise ValueError(
            f"attention: the schedule {schedule!r} needs a mesh whose cp axis is ulysses x ring; this layout has the "
            f"{layout.size} ranks in one group"
        )
    return layout.grid


def check_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, schedule: str) -> None:
    """Raise ValueError where tensors, layout and schedule do not fit."""
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
        raise ValueError("attention: the layout's first document is continued, and its earlier keys are not here")
    if schedule not in SCHEDULES:
        raise ValueError(f"attention: there is no schedule {schedule!r}; there are {', '.join(SCHEDULES)}")


def _planned(q: Tensor, k: Tensor, v: Tensor, layout: Layout, schedule: str | None, reach: Reach) -> _Plan:
    """The plan of a schedule, the layout's where None; made once for a layout."""
    name, device = schedule or layout.attention, q.device
    if name == "auto":
        shape = AttentionShape(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.element_size(), reach)
        name = rank_schedules(layout, shape)[0].schedule
    plan: _Plan = layout.cached(("attention", name, reach, device), lambda: _Plan(layout, name, reach, device))
    return plan


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Softmax attention within documents, `[B, T_local, H, V]`; rows of padding give zero.

    Shapes: q `[B, T_local, H, K]`, k `[B, T_local, H_kv, K]`, v `[B, T_local, H_kv, V]`, H a multiple of H_kv;
    positions (rotary) are already applied. `causal`: a query sees the keys up to its own place, else all of its
    document. `window`: the newest `window` of them alone, without `causal` those less than `window` away. `schedule`:
    one of SCHEDULES, the layout's where None. Differentiable in q, k and v, every rank of the layout taking part.
    Raises ValueError where an argument does not fit.
    """
    check_attention(q, k, v, layout, schedule or layout.attention)
    chosen = _planned(q, k, v, layout, schedule, Reach(causal, window))
    ulysses = chosen.grid.ulysses_group
    if ulysses is None:
        out: Tensor = _Attention.apply(q, k, v, chosen.across, scale)  # type: ignore[no-untyped-call]
        return out
    heads = HeadPartition(q.shape[2], k.shape[2], chosen.grid.ulysses)
    q, k, v = map(chosen.sorted, scatter_heads(q, k, v, heads, ulysses))
    out = _Attention.apply(q, k, v, chosen.across, scale)  # type: ignore[no-untyped-call]
    return gather_heads(chosen.unsorted(out), heads, ulysses)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    layout: Layout,
    scale: float,
    *,
    schedule: str | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of some queries of each head, `[B, N, H, V]`: as `softmax_attention` gives for these alone.

    Shapes: q `[B, N, H, K]`, the n-th query of each head for itself; k `[B, T_local, H, K]`, v `[B, T_local, H, V]`;
    rows `[B, H, N]`, the row of this rank's tokens that each query belongs to, ascending, of which several may be
    equal; -1, first, for no query, whose output is zero. N may differ from rank to rank. The rest as in
    `softmax_attention`, Ulysses over divisors of H; the bytes of keys are the same as there, those of queries and
    outputs are the routed ones'. Differentiable in q, k and v, every rank of the layout taking part.
    """
    fits = q.dim() == k.dim() == 4 and rows.shape == (q.shape[0], q.shape[2], q.shape[1]) and q.shape[2] == k.shape[2]
    if not fits:
        raise ValueError(
            f"routed attention: q {tuple(q.shape)}, k {tuple(k.shape)} and rows {tuple(rows.shape)} do not fit: "
            "expected [B, N, H, K], [B, T, H, K] and [B, H, N]"
        )
    check_attention(k, k, v, layout, schedule or layout.attention)
    chosen = _planned(k, k, v, layout, schedule, Reach(causal, window))
    places = chosen.begins[rows.clamp_min(0) // chosen.step] + rows % chosen.step
    places = torch.where(rows < 0, rows, places)
    ulysses = chosen.grid.ulysses_group
    if ulysses is None:
        out: Tensor = _Attention.apply(q, k, v, chosen.across.routed(places), scale)  # type: ignore[no-untyped-call]
        return out
    # Every rank of the group sends equally many; those that are no queries come first.
    counts = all_gather(torch.tensor([q.shape[1]], device=q.device), ulysses).wait()
    more = int(counts.max()) - q.shape[1]
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, more, 0))
    places = torch.nn.functional.pad(places, (more, 0), value=-1)
    heads = HeadPartition(q.shape[2], k.shape[2], chosen.grid.ulysses)
    q, k, v = scatter_heads(q, k, v, heads, ulysses)
    places = scatter_rows_of(places.transpose(1, 2)[..., None], heads.size, ulysses)[..., 0].transpose(1, 2)
    places, order = places.sort(dim=2, stable=True)
    order = order.transpose(1, 2)[..., None]
    q = q.gather(1, order.expand(-1, -1, -1, q.shape[3]))
    across = chosen.across.routed(places)
    out = _Attention.apply(q, chosen.sorted(k), chosen.sorted(v), across, scale)  # type: ignore[no-untyped-call]
    back = order.argsort(dim=1).expand(-1, -1, -1, out.shape[3])
    return gather_heads(out.gather(1, back), heads, ulysses)[:, more:]

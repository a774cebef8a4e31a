"""The state scan over slices and ranks (LASP-2, Sun et al. 2025, algorithms 1 and 2), for any linear recurrence.

Forward: every rank summarizes its slices, one all-gather brings all summaries to every rank, each rank scans them in
sequence order and applies each of its slices with the state that the slice receives. Backward alike, from the last
slice to the first. The payload is `B * H * (1 + K * V)` numbers a slice, in the accumulation dtype, whatever the
length of the sequence. Documents and the order of slices are in the layout; nothing is laid out anew.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear import Plan, scan
from longctx.kernels.recurrence import Carry, Gates, LinearRecurrence, Segment
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout
from longctx.parallel.traffic import current_layer, layer


def _exchange(carries: Sequence[Carry], layout: Layout) -> list[Carry]:
    """The carries of all slices in sequence order, from every rank's own in local order: one all-gather."""
    group = layout.peers
    if group is None:
        return list(carries)
    first = carries[0]
    payload = torch.stack([torch.cat([c.transition.flatten(), c.state.flatten()]) for c in carries])
    rows = all_gather(payload, group).wait()
    gathered = []
    for rank, place in layout.places:
        transition, state = rows[rank, place].split([first.transition.numel(), first.state.numel()])
        gathered.append(Carry(transition.view_as(first.transition), state.view_as(first.state)))
    return gathered


def _plan(layout: Layout) -> Plan:
    at = zip(layout.local, layout.slices, strict=True)
    pieces = tuple(Segment(local.start, local.stop, layout.starts(part)) for local, part in at)
    name = current_layer()

    def gather(carries: Sequence[Carry]) -> list[Carry]:
        # Backward too, where nobody says which layer it is.
        with layer(name):
            return _exchange(carries, layout)

    return Plan(pieces, layout.numbers(layout.rank), layout.pieces, gather)


def state_scan(
    recurrence: LinearRecurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    *,
    initial_state: Tensor | None = None,
    final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A linear recurrence over a sequence that lies over ranks as `layout` says, documents reset.

    Shapes: q `[B, T_local, Hq, K]`, k `[B, T_local, Hk, K]`, v `[B, T_local, Hv, V]`, gates as the recurrence defines
    them, those that run along the sequence for this rank's tokens; heads group as in `LinearRecurrence`. initial_state
    `[B, H, K, V]` in the accumulation dtype, the same on every rank: what the first document continues from, zero by
    default. Only a layout whose first document is `continued` may have one.

    Returns o `[B, T_local, Ho, V]` and, where asked for, the state after the whole sequence `[B, H, K, V]`, the same
    on every rank. Its gradient has to be the same on every rank too (of a loss counted once), and the gradient of
    initial_state is; that of a constant gate `[H]` is this rank's share, to be summed like a parameter's.
    """
    if q.dim() > 1 and q.shape[1] != layout.local_length:
        raise ValueError(
            f"q has {q.shape[1]} tokens: expected the {layout.local_length} that the layout gives this rank"
        )
    if initial_state is not None and not layout.continued:
        raise ValueError("initial_state is given, but the layout's first document is not continued and would drop it")
    out, final = scan(recurrence, q, k, v, gates, _plan(layout), initial_state)
    return out, final if final_state else None

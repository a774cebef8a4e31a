"""The state scan over slices and ranks (LASP-2, Sun et al. 2025, algorithms 1 and 2), for any linear recurrence.

Forward: every rank summarizes its slices, one all-gather brings all summaries to every rank, each rank scans them in
sequence order and applies each of its slices with the state that the slice receives. Backward alike, from the last
slice to the first. The payload is `B * H * (1 + K * V)` numbers a slice, in the accumulation dtype, whatever the
length of the sequence. Documents and the order of slices are in the layout; nothing is laid out anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.recurrence import Carry, LinearRecurrence, accumulation_dtype, exclusive_scan
from longctx.parallel.collectives import all_gather
from longctx.parallel.layout import Layout


def _exchange(carries: Sequence[Carry], layout: Layout) -> list[Carry]:
    """The carries of all slices in sequence order, from every rank's own in local order: one all-gather."""
    group = layout.peers
    if group is None:
        return list(carries)
    first = carries[0]
    payload = torch.stack([torch.cat([c.log_decay.flatten(), c.state.flatten()]) for c in carries])
    rows = all_gather(payload, group).wait()
    gathered = []
    for rank, place in map(layout.owner, range(layout.pieces)):
        log_decay, state = rows[rank, place].split([first.log_decay.numel(), first.state.numel()])
        gathered.append(Carry(log_decay.view_as(first.log_decay), state.view_as(first.state)))
    return gathered


class _StateScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        initial_state: Tensor,
        recurrence: LinearRecurrence,
        layout: Layout,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        parts = list(zip(layout.local, map(layout.starts, layout.slices), strict=True))
        states = [initial_state]
        if final or layout.pieces > 1:
            own = [recurrence.summarize(k[:, at], v[:, at], gates, starts) for at, starts in parts]
            states = exclusive_scan(_exchange(own, layout), initial_state)
        received = [states[number] for number in layout.numbers(layout.rank)]
        outs = [
            recurrence.apply(q[:, at], k[:, at], v[:, at], gates, starts, state)
            for (at, starts), state in zip(parts, received, strict=True)
        ]
        ctx.save_for_backward(q, k, v, gates, *received)
        ctx.recurrence, ctx.layout, ctx.parts, ctx.final = recurrence, layout, parts, final
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), states[-1] if final else None

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, gates, *received = ctx.saved_tensors
        recurrence, layout, parts = ctx.recurrence, ctx.layout, ctx.parts
        dfinal = torch.zeros_like(received[0]) if dfinal is None else dfinal
        dstates = [dfinal]
        if ctx.needs_input_grad[4] or layout.pieces > 1:
            own = [recurrence.summarize_grad(q[:, at], do[:, at], gates, starts) for at, starts in parts]
            dstates = exclusive_scan(reversed(_exchange(own, layout)), dfinal)
        grads = [
            recurrence.apply_grad(
                q[:, at], k[:, at], v[:, at], gates, starts, do[:, at], state, dstates[layout.pieces - 1 - number]
            )
            for (at, starts), state, number in zip(parts, received, layout.numbers(layout.rank), strict=True)
        ]
        dq, dk, dv = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in zip(*grads, strict=True))
        dinitial = dstates[-1] if ctx.needs_input_grad[4] else None
        return dq, dk, dv, None, dinitial, None, None, None


def state_scan(
    recurrence: LinearRecurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    layout: Layout,
    *,
    initial_state: Tensor | None = None,
    final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A linear recurrence over a sequence that lies over ranks as `layout` says, documents reset.

    Shapes: q, k `[B, T_local, H, K]`, v `[B, T_local, H, V]`, gates as the recurrence defines them (not
    differentiated), initial_state `[B, H, K, V]` in the accumulation dtype, the same on every rank: what the first
    document continues from, zero by default. Only a layout whose first document is `continued` may have one.

    Returns o `[B, T_local, H, V]` and, where asked for, the state after the whole sequence `[B, H, K, V]`, the same
    on every rank. Its gradient has to be the same on every rank too (of a loss counted once), and the gradient of
    initial_state is.
    """
    if gates.requires_grad:
        raise ValueError("state_scan: gates have no gradient here; detach them")
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"state_scan: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if q.shape[1] != layout.local_length:
        raise ValueError(f"state_scan: {q.shape[1]} tokens, but the layout gives this rank {layout.local_length}")
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is None:
        initial_state = torch.zeros(shape, dtype=accumulation_dtype(q.dtype), device=q.device)
    elif not layout.continued:
        raise ValueError("state_scan: initial_state is given, but the layout's first document is not continued")
    elif initial_state.shape != shape:
        raise ValueError(f"state_scan: initial_state {tuple(initial_state.shape)} should be {shape}")
    out, state = _StateScan.apply(q, k, v, gates, initial_state, recurrence, layout, final_state)  # type: ignore[no-untyped-call]
    return out, state

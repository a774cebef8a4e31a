"""The state scan over slices and ranks (LASP-2, Sun et al. 2025, algorithms 1 and 2), for any linear recurrence.

Forward: every rank summarizes its slices, one all-gather brings all summaries to every rank, each rank scans them in
sequence order and applies each of its slices with the state that the slice receives. Backward alike, from the last
slice to the first. The payload is `B * H * (1 + K * V)` numbers a slice, in the accumulation dtype, whatever the
length of the sequence. Documents and the order of slices are in the layout; nothing is laid out anew.
"""

from dataclasses import dataclass

from torch import Tensor

from longctx.kernels.linear import api as kernel
from longctx.kernels.linear.api import Plan
from longctx.kernels.linear.recurrence import Gates, LinearRecurrence, Segment
from longctx.parallel.layout import Layout
from longctx.parallel.linear.state_exchange import RankExchange
from longctx.parallel.traffic import current_layer


def _plan(layout: Layout, initial_state: Tensor | None, final_state: bool) -> Plan:
    """What `state_scan` does with these: the state after the sequence travels only where it is asked for, and so does
    the gradient of that before it.
    """
    at = zip(layout.local, layout.slices, strict=True)
    pieces = tuple(Segment(local.start, local.stop, layout.starts(part)) for local, part in at)
    group = layout.peers
    if group is None:
        return Plan(pieces)
    wanted = final_state, initial_state is not None and initial_state.requires_grad
    return Plan(pieces, RankExchange(layout, group, layout.states, current_layer(), wanted))


@dataclass(frozen=True)
class Begun:
    """A scan that is under way: what its states need of k, v and the gates has been computed, and is travelling."""

    plan: Plan
    begun: kernel.Begun | None


def begin_state_scan(
    recurrence: LinearRecurrence,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    *,
    initial_state: Tensor | None = None,
    final_state: bool = False,
) -> Begun:
    """Begin `state_scan` with what the exchange of states needs; call that with the same arguments, and this result.

    What is computed between the two (queries, output gates) does not wait for other ranks. Raises ValueError as
    `state_scan` does.
    """
    _check(k, layout, initial_state)
    plan = _plan(layout, initial_state, final_state)
    state = kernel.empty_state(k, v, gates) if initial_state is None else initial_state
    return Begun(plan, kernel.begin(recurrence, k, v, gates, plan, state))


def _check(x: Tensor, layout: Layout, initial_state: Tensor | None) -> None:
    if x.dim() > 1 and x.shape[1] != layout.local_length:
        raise ValueError(
            f"q has {x.shape[1]} tokens: expected the {layout.local_length} that the layout gives this rank"
        )
    if initial_state is not None and not layout.past_tokens:
        raise ValueError("initial_state is given, but the layout's first document is not continued and would drop it")


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
    begun: Begun | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A linear recurrence over a sequence that lies over ranks as `layout` says, documents reset.

    Shapes: q `[B, T_local, Hq, K]`, k `[B, T_local, Hk, K]`, v `[B, T_local, Hv, V]`, gates as the recurrence defines
    them, those that run along the sequence for this rank's tokens; heads group as in `LinearRecurrence`. initial_state
    `[B, H, K, V]` in the accumulation dtype, the same on every rank: what the first document continues from, zero by
    default. Only a layout whose first document is `past_tokens` may have one.

    Returns o `[B, T_local, Ho, V]` and, where asked for, the state after the whole sequence `[B, H, K, V]`, the same
    on every rank. Its gradient has to be the same on every rank too (of a loss counted once), and the gradient of
    initial_state is; that of a constant gate `[H]` is this rank's share, to be summed like a parameter's.
    """
    _check(q, layout, initial_state)
    if begun is None:
        begun = Begun(_plan(layout, initial_state, final_state), None)
    out, final = kernel.scan_recurrence(recurrence, q, k, v, gates, begun.plan, initial_state, begun.begun)
    return out, final if final_state else None

"""State scan over pieces and ranks (LASP-2, Sun et al. 2025, algorithms 1 and 2), for any linear recurrence.

Forward: every rank summarizes its pieces, one all-gather brings all carries to every rank, each rank scans them in
sequence order and applies each of its pieces from its start state. Backward: the same, from the last piece to the
first. The payload is `B * H * (1 + K * V)` numbers per piece in the accumulation dtype, whatever the sequence length.
The layout defines documents and the order of pieces; no token changes ranks.
"""

from dataclasses import dataclass

from torch import Tensor

from longctx.kernels.linear.api import PendingScan, Plan, begin_scan
from longctx.kernels.linear.recurrence import Gates, LinearRecurrence
from longctx.parallel.layout import Layout
from longctx.parallel.linear.state_exchange import RankExchange
from longctx.parallel.traffic import current_layer


@dataclass(frozen=True)
class StateScan:
    """A state scan from `begin_state_scan`, its states in exchange between ranks."""

    layout: Layout
    pending: PendingScan
    final_state: bool

    def finish(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Wait for the states and return o and the final state, as `state_scan` does, for q `[B, T_local, Hq, K]`.

        Raises ValueError where q does not fit.
        """
        self.layout.check_length("q", q)
        out, final = self.pending.finish(q)
        return out, final if self.final_state else None


def begin_state_scan(
    recurrence: LinearRecurrence,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    *,
    initial_state: Tensor | None = None,
    final_state: bool = False,
) -> StateScan:
    """Start a state scan: summarize this rank's pieces and send their carries. `finish(q)` of the result ends it.

    Computation between the two (queries, output gates) overlaps with the exchange. Arguments and errors as in
    `state_scan`.
    """
    layout.check_length("k", k)
    if initial_state is not None and not layout.past_tokens:
        raise ValueError("initial_state is given, but the layout has past_tokens = 0 and would ignore it")
    plan = _plan(layout, initial_state, final_state)
    return StateScan(layout, begin_scan(recurrence, k, v, gates, plan, initial_state), final_state)


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
    """Compute a linear recurrence over a sequence that `layout` splits over ranks; documents reset the state.

    Shapes: q `[B, T_local, Hq, K]`, k `[B, T_local, Hk, K]`, v `[B, T_local, Hv, V]`; gates as the recurrence defines
    them, those that run along the sequence for this rank's tokens; heads group as in
    `longctx.kernels.linear.recurrence.Inputs`. initial_state `[B, H, K, V]` in the accumulation dtype, the same on
    every rank, is the start state of the first document, zero by default; only a layout with `past_tokens` may have
    one.

    Returns o `[B, T_local, Ho, V]` and, with `final_state`, the state after the whole sequence `[B, H, K, V]`, the same
    on every rank. The final state's gradient has to be the same on every rank too (of a loss counted once), and the
    gradient of initial_state is; the gradient of a constant gate `[H]` is this rank's summand, as for a parameter.
    Raises ValueError, naming the argument, where one does not fit.
    """
    layout.check_length("q", q)
    scan = begin_state_scan(recurrence, k, v, gates, layout, initial_state=initial_state, final_state=final_state)
    return scan.finish(q)


def _plan(layout: Layout, initial_state: Tensor | None, final_state: bool) -> Plan:
    """Return the plan of this rank's pieces.

    Ranks exchange the final state and the initial state's gradient only where needed.
    """
    group = layout.comm_group
    if group is None:
        return Plan(layout.segments)
    final_needed = final_state, initial_state is not None and initial_state.requires_grad
    return Plan(layout.segments, RankExchange(layout, group, layout.states, current_layer(), final_needed))

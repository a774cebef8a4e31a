"""Linear attention on one device, and the inter-segment scan that it shares with sequences split over ranks.

A sequence is cut into pieces, and a piece into segments. Forward: every segment is summarized to a carry, the carries
of a piece are composed, `Plan.exchange` returns each piece's start state, and each segment is applied from its start
state. Backward: the same, from the last piece to the first. On one device there is one piece and no exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.checks import check_state, checked_cu_seqlens
from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.recurrence import Carry, GateGrads, Gates, Inputs, LinearRecurrence, Segment
from longctx.kernels.linear.segment_scan import compose_segments, scan_segments

PieceStates = tuple[list[Tensor], Tensor]
"""Start states of a device's pieces, `[B, H, K, V]` each, and the state after the whole sequence."""


class StateExchange(Protocol):
    """Exchange of states between the pieces of a sequence that is split over devices."""

    def __call__(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], PieceStates]:
        """Start the exchange of this device's carries, one per piece; the returned function waits for the states.

        `state` is the start state of the sequence's first piece. `reverse`: from the last piece to the first.
        """


@dataclass(frozen=True)
class Plan:
    """Pieces of a sequence on this device, in row order, and the exchange that computes their start states.

    Rows between and after the pieces are padding: not computed, with zero outputs and gradients. Without `exchange`
    there is one piece, the whole sequence.
    """

    pieces: tuple[Segment, ...]
    exchange: StateExchange | None = None

    def zero_padding_(self, *tensors: Tensor | None) -> None:
        """Zero the rows `[B, T, ...]` that belong to no piece, in place; constant gates `[H]` are left as they are."""
        begins = [piece.begin for piece in self.pieces[1:]]
        for x in tensors:
            if x is not None and x.dim() > 1:
                for piece, following in zip(self.pieces, [*begins, x.shape[1]], strict=True):
                    x[:, piece.end : following] = 0


@dataclass(frozen=True)
class _Exchanging:
    """Pass 1 of a scan over devices: what it prepared, the carries of each piece's segments, the exchange under way."""

    prepared: tuple[Tensor, ...]
    carries: list[Carry]
    wait: Callable[[], PieceStates]


@dataclass(frozen=True)
class PendingScan:
    """A scan from `begin_scan`, its states in exchange: computation before `finish` overlaps with communication."""

    recurrence: LinearRecurrence
    k: Tensor
    v: Tensor
    gates: Gates
    plan: Plan
    initial_state: Tensor | None
    exchanging: _Exchanging | None

    def finish(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Wait for the states and return o `[B, T, Ho, V]` in v's dtype, and the state after the sequence.

        Differentiable in q, k, v, the gates and the initial state. Raises ValueError where q does not fit.
        """
        inputs = Inputs(q, self.k, self.v, self.gates)
        self.recurrence.check(inputs)
        state = inputs.empty_state() if self.initial_state is None else self.initial_state
        check_state("initial_state", state, inputs)
        out, final = _Scan.apply(  # type: ignore[no-untyped-call]
            q, self.k, self.v, state, self.recurrence, self.plan, self.exchanging, *self.gates
        )
        return out, final


def begin_scan(
    recurrence: LinearRecurrence, k: Tensor, v: Tensor, gates: Gates, plan: Plan, initial_state: Tensor | None = None
) -> PendingScan:
    """Summarize the segments and start the exchange of states, where there is one; `finish(q)` of the result ends it.

    Shapes as in `Inputs`. initial_state `[B, H, K, V]` in the accumulation dtype is the start state of the first piece,
    zero by default. Raises ValueError, naming the argument, where one does not fit.
    """
    exchanging = None
    if plan.exchange is not None:
        inputs = Inputs(None, k, v, gates)
        recurrence.check(inputs)
        state = inputs.empty_state() if initial_state is None else initial_state
        check_state("initial_state", state, inputs)
        exchanging = _start_exchange(recurrence, inputs, plan.exchange, _cut(recurrence, plan, inputs), state)
    return PendingScan(recurrence, k, v, gates, plan, initial_state, exchanging)


def scan_recurrence(
    recurrence: LinearRecurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    plan: Plan,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a linear recurrence over the tokens of a plan: `begin_scan` and `finish` in one call."""
    return begin_scan(recurrence, k, v, gates, plan, initial_state).finish(q)


@torch.no_grad()
def _start_exchange(
    recurrence: LinearRecurrence,
    inputs: Inputs,
    exchange: StateExchange,
    segments: list[list[Segment]],
    initial_state: Tensor,
) -> _Exchanging:
    with torch.autocast(inputs.k.device.type, enabled=False):
        inputs = recurrence.prepare(inputs, _flat(segments))
        carries = _by_piece(recurrence.summarize(inputs, _flat(segments)), segments)
        wait = exchange([compose_segments(piece) for piece in carries], initial_state, False)
        return _Exchanging(inputs.prepared, carries, wait)


def _cut(recurrence: LinearRecurrence, plan: Plan, inputs: Inputs) -> list[list[Segment]]:
    """Cut each piece into segments."""
    batch, heads, _, _ = inputs.state_shape
    size = recurrence.segment_length(batch * heads, inputs.k.shape[1], inputs.k.device)
    return [piece.cut(size) for piece in plan.pieces]


def _flat(segments: Sequence[Sequence[Segment]]) -> list[Segment]:
    return [segment for piece in segments for segment in piece]


class _Scan(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial_state: Tensor,
        recurrence: LinearRecurrence,
        plan: Plan,
        exchanging: _Exchanging | None,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(q, k, v, gates)
        by_piece = _cut(recurrence, plan, inputs)
        segments = _flat(by_piece)
        if exchanging is not None:
            states, final = _states_within(exchanging.carries, exchanging.wait(), reverse=False)
            inputs = replace(inputs, prepared=exchanging.prepared)
            out, _ = recurrence.apply(inputs, segments, states)
        elif len(segments) == 1:
            states = initial_state[None]
            out, ends = recurrence.apply(inputs, segments, states)
            final = ends[0]
        else:
            inputs = recurrence.prepare(inputs, segments)
            states, final = scan_segments(recurrence.summarize(inputs, segments), initial_state)
            out, _ = recurrence.apply(inputs, segments, states)
        plan.zero_padding_(out)
        ctx.save_for_backward(q, k, v, states, *gates)
        ctx.recurrence, ctx.plan, ctx.by_piece = recurrence, plan, by_piece
        ctx.set_materialize_grads(False)
        # Without tokens `final` is the input itself, and an output has to be another tensor.
        return out, final.clone() if final is initial_state else final

    @staticmethod
    @exact_backward
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, states, *gates = ctx.saved_tensors
        inputs = Inputs(q, k, v, tuple(gates))
        recurrence: LinearRecurrence = ctx.recurrence
        plan: Plan = ctx.plan
        segments = _flat(ctx.by_piece)
        if do is None:
            do = v.new_zeros((*q.shape[:2], inputs.output_heads, v.shape[3]))
        dfinal = torch.zeros_like(states[0]) if dfinal is None else dfinal
        one_segment = plan.exchange is None and len(segments) == 1
        gate_grads = any(ctx.needs_input_grad[7:])
        carries, wait = [], None
        if not one_segment:
            # Again, rather than kept from the forward pass: that would be memory for as long as q, k and v are.
            inputs = recurrence.prepare(inputs, segments)
            carries = _by_piece(recurrence.summarize_grad(inputs, segments, do), ctx.by_piece)
            if plan.exchange is not None:
                wait = plan.exchange([compose_segments(piece, reverse=True) for piece in carries], dfinal, True)
        # Overlaps with the exchange of the states' gradients.
        dq = None if gate_grads else recurrence.query_grad(inputs, segments, do, states)
        dinitial: Tensor | None = None
        if one_segment:
            dends = dfinal[None]
        elif wait is None:
            dends, dinitial = scan_segments(carries[0], dfinal, reverse=True)
        else:
            dends, dinitial = _states_within(carries, wait(), reverse=True)
        dgates: GateGrads = (None,) * len(gates)
        if dq is None:
            dq, dk, dv, dgates, dstates = recurrence.apply_grad(inputs, segments, do, states, dends, gate_grads)
        else:
            dk, dv, dstates = recurrence.key_value_grad(inputs, segments, do, dends)
        dinitial = dstates[0] if one_segment else dinitial
        plan.zero_padding_(dq, dk, dv, *dgates)
        return dq, dk, dv, dinitial if ctx.needs_input_grad[3] else None, None, None, None, *dgates


def _by_piece(carry: Carry, segments: Sequence[Sequence[Segment]]) -> list[Carry]:
    """Split the carries of all segments by piece."""
    sizes = [len(piece) for piece in segments]
    parts = zip(carry.transition.split(sizes), carry.state.split(sizes), strict=True)
    return [Carry(transition, state) for transition, state in parts]


def _states_within(carries: Sequence[Carry], received: PieceStates, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return the start state of each segment of each piece, `[N, B, H, K, V]`, and the state after the sequence."""
    states, final = received
    parts = [scan_segments(c, state, reverse=reverse)[0] for c, state in zip(carries, states, strict=True)]
    return torch.cat(parts), final


DENOMINATOR_EPS = 1e-6
"""Added to the normalizer before dividing."""


def append_normalizer(v: Tensor) -> Tensor:
    """Append a channel of ones to v `[..., V]`; its output is the normalizer, the sum of an output's weights."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def divide_by_normalizer(out: Tensor, eps: float = DENOMINATOR_EPS) -> Tensor:
    """Divide outputs by their normalizer, the last of the `[..., V + 1]` channels: returns `[..., V]`."""
    return out[..., :-1] / (out[..., -1:] + eps)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float = 1.0,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    continued: bool = False,
    normalize: bool = False,
    eps: float = DENOMINATOR_EPS,
    initial_state: Tensor | None = None,
    final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute any linear attention variant on one device: `S_t = A_t S_{t-1} + k_t w_t^T`, `o_t = scale S_t^T q_t`.

    Without beta `A_t = diag(exp(log_decay_t))` and `w_t = v_t`: basic linear attention (no log_decay), lightning
    attention and retention (`[H]`), simple GLA and Mamba-2 (`[B, T, H]`), GLA and HGRN-2 (`[B, T, H, K]`). With beta
    the delta rule, `A_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))`, `w_t = beta_t v_t`: DeltaNet, Gated DeltaNet
    (log_decay `[B, T, H]`), KDA (`[B, T, H, K]`). `longctx.kernels.linear.reference` is the token-by-token form.

    Shapes: q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]` of one dtype; beta `[B, T, H]`. H, the number of
    states, is the largest head count of k, v and the gates; each of these may have a divisor of H, q a divisor or a
    multiple, and nothing is repeated in memory. `cu_seqlens` are the cumulative lengths of packed documents, each of
    which starts from an empty state; with `continued` the first one starts from initial_state `[B, H, K, V]` (float32,
    or float64 for float64 tokens). Without cu_seqlens the sequence always starts from initial_state. `normalize`
    divides o_t by `scale sum_j a_tj + eps`, a_tj the weights that multiply the values (Katharopoulos et al. 2020,
    eq. 4), and needs non-negative features; it appends a value channel, so that states have V + 1 channels.

    Returns o `[B, T, max(Hq, H), V]` and, with `final_state`, the state after the last token. Differentiable in every
    tensor. Raises ValueError, naming the argument, where one does not fit.
    """
    gates = tuple(x for x in (beta, log_decay) if x is not None)
    recurrence = _recurrence_of(beta)
    length = q.shape[1] if q.dim() > 1 else 0
    starts: tuple[int, ...] = ()
    if cu_seqlens is not None:
        bounds = checked_cu_seqlens(cu_seqlens, length)
        starts = bounds[1:-1] if continued else bounds[:-1]
        if initial_state is not None and not continued:
            raise ValueError("initial_state is given, but the first document is not `continued` and would ignore it")
    if scale != 1.0:
        q = q * scale
    dtype = q.dtype
    if normalize:
        # The normalizer can overflow float16, and its rounding error would scale every channel.
        q, k, v = (x.to(accumulation_dtype(dtype)) for x in (q, k, v))
        v = append_normalizer(v)
    out, final = scan_recurrence(recurrence, q, k, v, gates, Plan((Segment(0, length, starts),)), initial_state)
    if normalize:
        out = divide_by_normalizer(out, eps).to(dtype)
    return out, final if final_state else None


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decode one token: o `[B, max(Hq, H), V]` and the new recurrent state, from the state `[B, H, K, V]` before it.

    Shapes: q `[B, Hq, K]`, k `[B, Hk, K]`, v `[B, Hv, V]`, log_decay `[H]`, `[B, H]` or `[B, H, K]`, beta `[B, H]`. The
    same equations as `linear_attention` with scale 1, computed in the state's dtype; differentiable by autograd. Raises
    ValueError, naming the argument, where one does not fit.
    """
    recurrence = _recurrence_of(beta)
    gates = tuple(g if g is log_decay and g.dim() == 1 else g[:, None] for g in (beta, log_decay) if g is not None)
    inputs = Inputs(q[:, None], k[:, None], v[:, None], gates)
    recurrence.check(inputs)
    check_state("state", state, inputs)
    out, state = recurrence.step(inputs, state)
    return out[:, 0], state


def _recurrence_of(beta: Tensor | None) -> LinearRecurrence:
    """Return the delta rule if there is a beta, else the additive recurrence."""
    return ADDITIVE if beta is None else DELTA

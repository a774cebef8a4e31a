"""Linear attention on one device, and the scan that it shares with sequences that lie over ranks.

A sequence is cut into pieces, and a piece into segments. Forward: every segment is summarized, the summaries of a
piece are combined, `Plan.exchange` brings each piece its state, and each segment is applied with the state that
it receives. Backward alike, from the last piece to the first. On one device there is one piece and no exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.checks import check_state, checked_cu_seqlens
from longctx.kernels.linear.operators import ADDITIVE, DELTA
from longctx.kernels.linear.recurrence import Carry, Gates, LinearRecurrence, Segment, state_heads
from longctx.kernels.linear.segment_scan import combined, scan_segments

Received = tuple[list[Tensor], Tensor]
"""The state that each of a device's pieces receives, `[B, H, K, V]` each, and the state after the whole sequence."""


class StateExchange(Protocol):
    """How states reach the pieces of a sequence that lies over devices."""

    def __call__(self, carries: Sequence[Carry], state: Tensor, reverse: bool) -> Callable[[], Received]:
        """Begin, with the carries of this device's pieces and the state that the first piece of the sequence receives.

        What comes back waits for the others. `reverse`: the sequence runs from its last piece to its first.
        """


@dataclass(frozen=True)
class Plan:
    """How the tokens at hand make up a sequence.

    `pieces` are this device's, in the order in which they lie here. Rows between and behind them are padding: they are
    not computed, and their outputs and gradients are zero. Without `exchange` the one piece is the sequence.
    """

    pieces: tuple[Segment, ...]
    exchange: StateExchange | None = None

    def zero_padding_(self, *tensors: Tensor | None) -> None:
        """Zero the rows `[B, T, ...]` that no piece has, in place; what does not run along the sequence is left."""
        begins = [piece.begin for piece in self.pieces[1:]]
        for x in tensors:
            if x is not None and x.dim() > 1:
                for piece, following in zip(self.pieces, [*begins, x.shape[1]], strict=True):
                    x[:, piece.end : following] = 0


@dataclass(frozen=True)
class Begun:
    """Pass 1 of a scan and what it has set under way."""

    carries: list[Carry]
    """Of each piece's segments."""
    wait: Callable[[], Received]


def begin(
    recurrence: LinearRecurrence, k: Tensor, v: Tensor, gates: Gates, plan: Plan, initial_state: Tensor
) -> Begun | None:
    """Summarize, and set the exchange of states under way: `scan_recurrence` goes on with it. None where nothing is
    exchanged.

    What needs no state (queries, output gates) can be computed in the meantime. Arguments as in `scan_recurrence`.
    """
    if plan.exchange is None:
        return None
    recurrence.check(k, k, v, gates)
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        cut = _cut(recurrence, plan, k, initial_state)
        segments = [segment for piece in cut for segment in piece]
        carries = _split(recurrence.summarize(k, v, gates, segments), cut)
        return Begun(carries, plan.exchange([combined(piece) for piece in carries], initial_state, False))


def _cut(recurrence: LinearRecurrence, plan: Plan, k: Tensor, state: Tensor) -> list[list[Segment]]:
    """Each piece in segments."""
    size = recurrence.segment_length(k.shape[0] * state.shape[1], k.shape[1], k.device)
    return [piece.cut(size) for piece in plan.pieces]


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
        begun: Begun | None,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        cut = _cut(recurrence, plan, k, initial_state)
        segments = [segment for piece in cut for segment in piece]
        if plan.exchange is None and len(segments) == 1:
            states = initial_state[None]
            out, ends = recurrence.apply(q, k, v, gates, segments, states)
            final = ends[0]
        else:
            begun = begun or begin(recurrence, k, v, gates, plan, initial_state)
            if begun is None:
                carries = _split(recurrence.summarize(k, v, gates, segments), cut)
                states, final = scan_segments(carries[0], initial_state)
            else:
                states, final = _within(begun.carries, begun.wait(), reverse=False)
            out, _ = recurrence.apply(q, k, v, gates, segments, states)
        plan.zero_padding_(out)
        ctx.save_for_backward(q, k, v, states, *gates)
        ctx.recurrence, ctx.plan, ctx.cut, ctx.segments = recurrence, plan, cut, segments
        ctx.set_materialize_grads(False)
        # Another tensor than the one that came in, where there is no token to change it.
        return out, final.clone() if final is initial_state else final

    @staticmethod
    @exact_backward
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, states, *gates = ctx.saved_tensors
        recurrence, plan = ctx.recurrence, ctx.plan
        gates = tuple(gates)
        if do is None:
            do = v.new_zeros((*q.shape[:2], max(q.shape[2], states.shape[2]), v.shape[3]))
        dfinal = torch.zeros_like(states[0]) if dfinal is None else dfinal
        alone = plan.exchange is None and len(ctx.segments) == 1
        gate_grads = any(ctx.needs_input_grad[7:])
        carries, begun = [], None
        if not alone:
            carries = _split(recurrence.summarize_grad(q, k, v, gates, ctx.segments, do), ctx.cut)
            if plan.exchange is not None:
                begun = plan.exchange([combined(piece, reverse=True) for piece in carries], dfinal, True)
        # While the gradients of states travel.
        dq = None if gate_grads else recurrence.query_grad(q, k, v, gates, ctx.segments, do, states)
        dinitial: Tensor | None = None
        if alone:
            dends = dfinal[None]
        elif begun is None:
            dends, dinitial = scan_segments(carries[0], dfinal, reverse=True)
        else:
            dends, dinitial = _within(carries, begun(), reverse=True)
        dgates: tuple[Tensor | None, ...] = (None,) * len(gates)
        if dq is None:
            dq, dk, dv, dgates, dstates = recurrence.apply_grad(
                q, k, v, gates, ctx.segments, do, states, dends, gate_grads
            )
        else:
            dk, dv, dstates = recurrence.key_value_grad(q, k, v, gates, ctx.segments, do, dends)
        dinitial = dstates[0] if alone else dinitial
        plan.zero_padding_(dq, dk, dv, *dgates)
        return dq, dk, dv, dinitial if ctx.needs_input_grad[3] else None, None, None, None, *dgates


def _split(carry: Carry, cut: Sequence[Sequence[Segment]]) -> list[Carry]:
    """The carries of each piece's segments, from those of all."""
    sizes = [len(piece) for piece in cut]
    parts = zip(carry.transition.split(sizes), carry.state.split(sizes), strict=True)
    return [Carry(transition, state) for transition, state in parts]


def _within(carries: Sequence[Carry], received: Received, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """What each segment of each piece receives, `[N, B, H, K, V]`, and what comes out behind the whole sequence."""
    states, final = received
    parts = [scan_segments(c, state, reverse=reverse)[0] for c, state in zip(carries, states, strict=True)]
    return torch.cat(parts), final


def empty_state(k: Tensor, v: Tensor, gates: Gates) -> Tensor:
    """The state before the first token, `[B, H, K, V]`."""
    shape = (k.shape[0], state_heads(k, v, gates), k.shape[3], v.shape[3])
    return torch.zeros(shape, dtype=accumulation_dtype(k.dtype), device=k.device)


def scan_recurrence(
    recurrence: LinearRecurrence,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    plan: Plan,
    initial_state: Tensor | None = None,
    begun: Begun | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear recurrence over the tokens of a plan: o `[B, T, Ho, V]` in v's dtype and the state after the sequence.

    Shapes as in `LinearRecurrence`. initial_state `[B, H, K, V]` in the accumulation dtype is what the first piece
    receives, zero by default. `begun` is what `begin` gave for the same arguments. Differentiable in q, k, v, the gates
    and initial_state.
    """
    recurrence.check(q, k, v, gates)
    if initial_state is None:
        initial_state = empty_state(k, v, gates)
    check_state("initial_state", initial_state, q, k, v, gates)
    out, final = _Scan.apply(q, k, v, initial_state, recurrence, plan, begun, *gates)  # type: ignore[no-untyped-call]
    return out, final


DENOMINATOR_EPS = 1e-6
"""Added to the denominator."""


def with_ones(v: Tensor) -> Tensor:
    """v `[..., V]` with a channel of ones, whose output is the sum of an output's weights."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def divide_by_sum(out: Tensor, eps: float = DENOMINATOR_EPS) -> Tensor:
    """Outputs `[..., V]` divided by the sums of their weights, from those of `with_ones`, `[..., V + 1]`."""
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
    """Every linear mixer of this library on one device: `S_t = A_t S_{t-1} + k_t w_t^T`, `o_t = scale S_t^T q_t`.

    Without beta `A_t = diag(exp(log_decay_t))` and `w_t = v_t`: basic linear attention (no log_decay), lightning
    attention and retention (`[H]`), simple GLA and Mamba-2 (`[B, T, H]`), GLA and HGRN-2 (`[B, T, H, K]`). With beta
    the delta rule, `A_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))`, `w_t = beta_t v_t`: DeltaNet, Gated DeltaNet
    (log_decay `[B, T, H]`), KDA (`[B, T, H, K]`). `longctx.kernels.linear.reference` says it token by token.

    Shapes: q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]` of one dtype; beta `[B, T, H]`. The most heads of
    k, v and the gates are those of the state; each of these and q may have a divisor of them, q also a multiple, and
    nothing is repeated in memory. `cu_seqlens` are the cumulated lengths of packed documents; each of them begins with
    an empty state, except the first where it is `continued` from initial_state `[B, H, K, V]` (float32, or float64 for
    float64 tokens), which without cu_seqlens the sequence always is. `normalize` divides o_t by
    `scale sum_j a_tj + eps`, a_tj the weights that multiply the values (Katharopoulos et al. 2020, eq. 4): a value
    channel of ones, so that the states have V + 1 channels; it needs features that are not negative.

    Returns o `[B, T, max(Hq, H), V]` and, where `final_state`, the state after the last token. Differentiable in every
    tensor. Raises ValueError where an argument does not fit, naming it.
    """
    gates = tuple(x for x in (beta, log_decay) if x is not None)
    recurrence = ADDITIVE if beta is None else DELTA
    length = q.shape[1] if q.dim() > 1 else 0
    starts: tuple[int, ...] = ()
    if cu_seqlens is not None:
        bounds = checked_cu_seqlens(cu_seqlens, length)
        starts = bounds[1:-1] if continued else bounds[:-1]
        if initial_state is not None and not continued:
            raise ValueError("initial_state is given, but the first document is not `continued` and would drop it")
    if scale != 1.0:
        q = q * scale
    dtype = q.dtype
    if normalize:
        # A sum of weights is larger than float16 holds, and its rounding would be that of every channel.
        q, k, v = (x.to(accumulation_dtype(dtype)) for x in (q, k, v))
        v = with_ones(v)
    out, final = scan_recurrence(recurrence, q, k, v, gates, Plan((Segment(0, length, starts),)), initial_state)
    if normalize:
        out = divide_by_sum(out, eps).to(dtype)
    return out, final if final_state else None


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of generation: o `[B, max(Hq, H), V]` and the new state, for the state `[B, H, K, V]` before it.

    Shapes: q `[B, Hq, K]`, k `[B, Hk, K]`, v `[B, Hv, V]`, log_decay `[H]`, `[B, H]` or `[B, H, K]`, beta `[B, H]`. The
    same equations as `linear_attention` with scale 1, computed in the state's dtype; differentiable by autograd. Raises
    ValueError where an argument does not fit, naming it.
    """
    recurrence = ADDITIVE if beta is None else DELTA
    gates = tuple(g if g is log_decay and g.dim() == 1 else g[:, None] for g in (beta, log_decay) if g is not None)
    recurrence.check(q[:, None], k[:, None], v[:, None], gates)
    check_state("state", state, q[:, None], k[:, None], v[:, None], gates)
    heads = state.shape[1]

    def grouped(x: Tensor) -> Tensor:
        return x.to(state.dtype).repeat_interleave(heads // x.shape[1], dim=1)

    keys, values = grouped(k), grouped(v)
    if log_decay is not None:
        decay = grouped(log_decay[None] if log_decay.dim() == 1 else log_decay).exp()
        state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    if beta is not None:
        values = grouped(beta)[..., None] * (values - torch.einsum("bhk,bhkv->bhv", keys, state))
    state = state + keys[..., None] * values[..., None, :]
    queries = grouped(q) if q.shape[1] < heads else q.to(state.dtype)
    queries = queries.unflatten(1, (heads, -1))
    out = torch.einsum("bhrk,bhkv->bhrv", queries, state).flatten(1, 2)
    return out.to(v.dtype), state

"""Additive recurrence in Triton, on CUDA: constant, scalar and vector decays.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

Linear attention, lightning attention and retention (g constant per head), simple GLA and Mamba-2 (scalar: a number per
token), GLA (vector: a number per token and channel). Implements the passes of
`longctx.kernels.linear.recurrence.LinearRecurrence` for float32, bf16 and fp16; gates are `()` or `(log_decay,)`,
log_decay `[H]`, `[B, T, H]` or `[B, T, H, K]`, at most 0.

Each pass launches one program per sequence, head and segment (and tile of K or V where the state does not fit), so that
a single sequence with few heads fills the device. No state is stored per chunk: backward recomputes them. HBM traffic
in bytes per token and head, with e bytes per element and D = K = V, not counting the states (4 D^2 per segment and
pass) and what programs for tiles of the same state read again from the L2 cache:

                        constant    scalar        vector, in float32
    summarize           2De         2De + 4       2De + 4D
    apply               4De         4De + 4       in `longctx.kernels.linear.additive.triton_vector`
    summarize_grad      2De         2De + 4       2De + 4D
    apply_grad          10De        10De + 8      in `longctx.kernels.linear.additive.triton_vector`
    dgates              De + 28     De + 28
    KiB at D = 128 in bf16: forward 1.5, 1.5, 3.8; backward 3.0, 3.0, 9.2; with dgates 3.3, 3.3, 9.7

dk and dv take a sweep each above a head dim of 64, in float32 above 32, or where autotuning finds it faster. For vector
decays chunks are first prepared in parallel, and states are stored per chunk in the backward pass.

float32 products are three tf32 products each, accurate to about 1e-6 (`LaunchPlan.precision`), for 64 channels of keys
and of values at a time with constant and scalar decays (`_parts`), whose inputs are read again for each; those in the
summaries of vector decays are exact (IEEE). All are tf32 if torch's matmul may use it (`fp32_precision`). bf16 factors
are rounded to bf16 and summed in float32. fp16 inputs are multiplied as tf32, which has fp16's precision and does not
overflow. States, decays and the gradients of gates are float32.

Heads of k, v and gates that several states share are read in place; their gradients are written per state in float32
and summed. A state's program loops over the query heads that share the state.

Gradients of constant and scalar decays are sums within a segment, and so are the rounding errors of their bf16 terms:
hence short segments. Those of vector decays are sums within a chunk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from longctx.kernels.linear import tuning
from longctx.kernels.linear.additive import triton_vector
from longctx.kernels.linear.additive.triton_backward import dk_dv_kernel, dq_kernel
from longctx.kernels.linear.additive.triton_forward import apply_kernel, summary_kernel
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.linear.triton_launch import (
    LaunchPlan,
    after_last_start,
    allocate_grad,
    before_first_start,
    bounds_tensor,
    document_start_mask,
    maybe_with_strides,
    plan_launch,
    reduce_to_heads,
    segment_document_ids,
    segment_length,
    with_strides,
)

__all__ = ["apply", "apply_grad", "key_value_grad", "query_grad", "segment_length", "summarize", "summarize_grad"]

MAX_CHANNELS = 64
"""Most channels of keys, and of values, that a kernel takes in float32 (`_parts`)."""


def _plan(inputs: Inputs, segments: Sequence[Segment], *, queries: bool = True) -> LaunchPlan:
    return plan_launch("additive", inputs, inputs.gates[0] if inputs.gates else None, segments, queries)


def _is_vector(inputs: Inputs) -> bool:
    """Return whether the decay is a vector, `[B, T, H, K]`."""
    return bool(inputs.gates) and inputs.gates[0].dim() == 4


def _launch(plan: LaunchPlan, kernel: Any, sizes: tuning.TileSizes, *arguments: Any, **constants: Any) -> None:
    """Launch one program per segment, sequence, head and tile of the state."""
    programs = plan.state_tiles(sizes) * len(plan.segments) * plan.batch * plan.heads
    plan.launch(kernel, sizes, programs, *arguments, **constants)


@dataclass(frozen=True)
class _Part:
    """Key channels `rows` and value channels `columns` of a recurrence, which is one of its own.

    A state's tile of these rows and columns depends on no other. Outputs add up over rows, and gradients of queries and
    keys over columns.
    """

    rows: slice
    columns: slice

    def inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs of the part; their channels are strided."""
        q = None if inputs.q is None else inputs.q[..., self.rows]
        return Inputs(q, inputs.k[..., self.rows], inputs.v[..., self.columns], inputs.gates)

    def state(self, states: Tensor) -> Tensor:
        """Return the part's tile of states `[..., K, V]`."""
        return states[..., self.rows, self.columns]


def _parts(inputs: Inputs) -> list[_Part]:
    """Split the channels into parts that a kernel takes at a time: one for all, except in float32.

    A product of exact float32 factors keeps several registers per number along the channels that it sums over, and a
    thread has 255 of them.
    """
    wide = max(inputs.k.shape[3], inputs.v.shape[3]) > tuning.MAX_HEAD_DIM
    if wide or inputs.k.dtype != torch.float32 or (inputs.gates and inputs.gates[0].dim() == 4):
        return [_Part(slice(None), slice(None))]
    rows, columns = (
        [slice(begin, min(begin + MAX_CHANNELS, size)) for begin in range(0, size, MAX_CHANNELS)]
        for size in (inputs.k.shape[3], inputs.v.shape[3])
    )
    return [_Part(row, column) for row in rows for column in columns]


def _join(channels: int, found: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """Join results of parts along their last dimension, each with its channels; sum those of the same channels."""
    whole: Tensor | None = None
    begun = set()
    for at, result in found:
        if whole is None:
            whole = result.new_empty(*result.shape[:-1], channels)
        if at.start in begun:
            whole[..., at] += result
        else:
            whole[..., at] = result
            begun.add(at.start)
    assert whole is not None
    return whole


def _join_states(inputs: Inputs, parts: Sequence[_Part], tiles: Sequence[Tensor]) -> Tensor:
    """Join the parts' tiles of states `[..., K, V]`."""
    whole = tiles[0].new_empty(*tiles[0].shape[:-2], inputs.k.shape[3], inputs.v.shape[3])
    for part, tile in zip(parts, tiles, strict=True):
        part.state(whole).copy_(tile)
    return whole


def _summary(plan: LaunchPlan, x: Tensor, y: Tensor, bounds: tuple[tuple[int, int], ...], reverse: bool) -> Carry:
    shape = plan.state_shape
    state = torch.empty(shape, dtype=torch.float32, device=plan.device)
    total = torch.empty(
        shape[:4] if plan.decay_kind == "vector" else shape[:3], dtype=torch.float32, device=plan.device
    )
    sizes = plan.tile_sizes("summary")
    readers = plan.readers if reverse else 1
    _launch(
        plan,
        summary_kernel,
        sizes,
        *with_strides(x),
        *with_strides(y),
        *plan.gate,
        bounds_tensor(bounds, plan.device),
        state,
        total,
        X_GROUP=plan.heads * readers // x.shape[2],
        Y_GROUP=plan.heads * readers // y.shape[2],
        GATE_GROUP=plan.gate_group,
        READERS=readers,
        REVERSE=reverse,
    )
    has_start = document_start_mask(plan.segments, plan.device)
    if has_start is not None:
        total.masked_fill_(has_start.view(-1, *[1] * (total.dim() - 1)), float("-inf"))
    return Carry(total, state)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1: each segment's carry; transition `[N, B, H]` or `[N, B, H, K]`, state `[N, B, H, K, V]`, float32.

    Reads only the last document of a segment. This pass and those below raise ValueError for dtypes and head dims that
    the kernels do not support.
    """
    parts = _parts(inputs)
    if len(parts) > 1:
        carries = [summarize(part.inputs(inputs), segments) for part in parts]
        return Carry(carries[0].transition, _join_states(inputs, parts, [carry.state for carry in carries]))
    plan = _plan(inputs, segments, queries=False)
    return _summary(plan, inputs.k, inputs.v, after_last_start(segments), reverse=False)


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: each segment's carry of gradients, shapes as in `summarize`.

    Reads only the shapes of k and v, and only the tokens before a segment's first document start.
    """
    parts = _parts(inputs)
    if len(parts) > 1:
        carries = [summarize_grad(part.inputs(inputs), segments, do[..., part.columns]) for part in parts]
        return Carry(carries[0].transition, _join_states(inputs, parts, [carry.state for carry in carries]))
    plan = _plan(inputs, segments)
    return _summary(plan, inputs.queries, do, before_first_start(segments), reverse=True)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2: o `[B, T, Ho, V]` in v's dtype, and the end states `[N, B, H, K, V]`, float32."""
    if _is_vector(inputs):
        return triton_vector.apply(inputs, segments, states)
    parts = _parts(inputs)
    if len(parts) > 1:
        results = [apply(part.inputs(inputs), segments, part.state(states)) for part in parts]
        outs = ((part.columns, out) for part, (out, _) in zip(parts, results, strict=True))
        return _join(inputs.v.shape[3], outs), _join_states(inputs, parts, [ends for _, ends in results])
    plan = _plan(inputs, segments)
    q, k, v = inputs.queries, inputs.k, inputs.v
    out = torch.empty(*q.shape[:2], plan.heads * plan.readers, v.shape[3], dtype=v.dtype, device=v.device)
    ends = torch.empty(plan.state_shape, dtype=torch.float32, device=v.device)
    sizes = plan.tile_sizes("apply")
    _launch(
        plan,
        apply_kernel,
        sizes,
        *with_strides(q),
        *with_strides(k),
        *with_strides(v),
        *plan.gate,
        segment_document_ids(plan.segments, plan.device),
        bounds_tensor(plan.bounds, plan.device),
        states.contiguous(),
        *with_strides(out),
        ends,
        **plan.group_sizes(q, k, v),
    )
    return out, ends


def apply_grad(
    inputs: Inputs,
    segments: Sequence[Segment],
    do: Tensor,
    states: Tensor,
    dends: Tensor,
    gate_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward: dq, dk, dv and dgates in the dtypes of q, k, v and gates, and the gradient of `states`, float32.

    One launch for dq and one for dk and dv, or one each for dk and dv where a program cannot hold all of K and V.
    """
    if _is_vector(inputs):
        return triton_vector.apply_grad(inputs, segments, do, states, dends, gate_grads)
    parts = _parts(inputs)
    if len(parts) > 1:
        results = [
            apply_grad(
                part.inputs(inputs), segments, do[..., part.columns], part.state(states), part.state(dends), gate_grads
            )
            for part in parts
        ]
        dgates: GateGrads = (None,) * len(inputs.gates)
        if inputs.gates and gate_grads:
            dgates = (torch.stack([cast(Tensor, r[3][0]) for r in results]).sum(dim=0),)
        return (
            _join(inputs.k.shape[3], ((part.rows, r[0]) for part, r in zip(parts, results, strict=True))),
            _join(inputs.k.shape[3], ((part.rows, r[1]) for part, r in zip(parts, results, strict=True))),
            _join(inputs.v.shape[3], ((part.columns, r[2]) for part, r in zip(parts, results, strict=True))),
            dgates,
            _join_states(inputs, parts, [r[4] for r in results]),
        )
    backward, gates = _Backward(inputs, segments, do), inputs.gates
    plan = backward.plan
    q_dq, end_terms = _allocate_decay_grad(plan, plan.tile_sizes("dq")) if gates and gate_grads else (None, None)
    dq = backward.dq(states, dends, q_dq, end_terms)
    dk, dv, dgate, dstates = backward.dk_dv(dends, q_dq, end_terms)
    found = (None,) * len(gates) if dgate is None else (_gate_grad(plan, dgate),)
    return dq, dk, dv, found, dstates


def query_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor:
    """Only dq of pass 2 backward, which needs no gradient of a state."""
    if _is_vector(inputs):
        return triton_vector.query_grad(inputs, segments, do, states)
    parts = _parts(inputs)
    if len(parts) > 1:
        found = (
            (part.rows, query_grad(part.inputs(inputs), segments, do[..., part.columns], part.state(states)))
            for part in parts
        )
        return _join(inputs.k.shape[3], found)
    return _Backward(inputs, segments, do).dq(states, None, None, None)


def key_value_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward, where no gate needs a gradient: dk, dv and the gradient of the start states."""
    if _is_vector(inputs):
        return triton_vector.key_value_grad(inputs, segments, do, dends)
    parts = _parts(inputs)
    if len(parts) > 1:
        results = [
            key_value_grad(part.inputs(inputs), segments, do[..., part.columns], part.state(dends)) for part in parts
        ]
        return (
            _join(inputs.k.shape[3], ((part.rows, r[0]) for part, r in zip(parts, results, strict=True))),
            _join(inputs.v.shape[3], ((part.columns, r[1]) for part, r in zip(parts, results, strict=True))),
            _join_states(inputs, parts, [r[2] for r in results]),
        )
    dk, dv, _, dstates = _Backward(inputs, segments, do).dk_dv(dends, None, None)
    return dk, dv, dstates


class _Backward:
    """Kernel launches of pass 2 backward."""

    def __init__(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> None:
        self.plan = plan = _plan(inputs, segments)
        self.q, self.k, self.v = q, k, v = inputs.queries, inputs.k, inputs.v
        self.arguments: list[Any] = [part for x in (q, k, v, do) for part in with_strides(x)]
        self.arguments += [
            *plan.gate,
            segment_document_ids(plan.segments, plan.device),
            bounds_tensor(plan.bounds, plan.device),
        ]
        self.group_sizes = plan.group_sizes(q, k, v)

    def dq(self, states: Tensor, dends: Tensor | None, q_dq: Tensor | None, end_terms: Tensor | None) -> Tensor:
        """Compute dq and fill `q_dq` and `end_terms`, from which `dk_dv` computes the decay's gradient.

        `dends` are read only for `end_terms`; all three may be None.
        """
        plan = self.plan
        dq = allocate_grad(self.q, plan.heads * plan.readers)
        _launch(
            plan,
            dq_kernel,
            plan.tile_sizes("dq"),
            *self.arguments,
            states.contiguous(),
            None if dends is None else dends.contiguous(),
            *with_strides(dq),
            *maybe_with_strides(q_dq),
            end_terms,
            **self.group_sizes,
        )
        return reduce_to_heads(dq, self.q)

    def dk_dv(
        self, dends: Tensor, q_dq: Tensor | None, end_terms: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Compute dk, dv, the decay's gradient from what `dq` filled in, and the gradient of the start states."""
        plan = self.plan
        dends = dends.contiguous()
        dstates = torch.empty_like(dends)
        dk, dv = (allocate_grad(x, plan.heads) for x in (self.k, self.v))
        sizes = plan.tile_sizes("dk_dv")
        fused = plan.state_tiles(sizes) == 1
        if not fused:
            sizes = plan.tile_sizes("dk")
        dgate = None
        if q_dq is not None and end_terms is not None:
            q_dq, end_terms = q_dq.unflatten(0, (-1, plan.batch)).sum(dim=0), end_terms.sum(dim=-1)
            dgate, _ = _allocate_decay_grad(plan, sizes)
            if plan.decay_kind == "constant" and sum(segment.size for segment in plan.segments) < plan.length:
                # Its gradient is the sum over all rows, and kernels write none for tokens in no segment.
                dgate.zero_()

        def sweep(sizes: tuning.TileSizes, *written: Any) -> None:
            _launch(plan, dk_dv_kernel, sizes, *self.arguments, dends, *written, **self.group_sizes)

        absent = maybe_with_strides(None)
        decay_arguments = (*maybe_with_strides(q_dq), *maybe_with_strides(dgate), end_terms)
        sweep(sizes, *with_strides(dk), *(with_strides(dv) if fused else absent), *decay_arguments, dstates)
        if not fused:
            sweep(plan.tile_sizes("dv"), *absent, *with_strides(dv), *absent, *absent, None, None)
        return reduce_to_heads(dk, self.k), reduce_to_heads(dv, self.v), dgate, dstates


def _allocate_decay_grad(plan: LaunchPlan, sizes: tuning.TileSizes) -> tuple[Tensor, Tensor]:
    """Allocate dg and the terms that a segment's end adds to it, float32, with the partial sums of each block of K.

    `[blocks x B, T, H]` and `[N, B, H, K]`. (A kernel that sums the end's terms over K too does not compile for sm_100
    in Triton 3.6 and 3.7: its compiler fails on the second of two sums of what tensor memory holds.)
    """
    batch, length, heads = plan.batch, plan.length, plan.heads
    shapes: tuple[tuple[int, ...], ...] = (plan.state_tiles(sizes) * batch, length, heads), plan.state_shape[:4]
    q_dq, end_terms = (torch.empty(shape, dtype=torch.float32, device=plan.device) for shape in shapes)
    return q_dq, end_terms


def _gate_grad(plan: LaunchPlan, dgate: Tensor) -> Tensor:
    """Reduce dg to the gradient of the log-decay, in its shape and dtype."""
    gate = plan.log_decay
    assert gate is not None
    dgate = dgate.unflatten(0, (-1, plan.batch)).sum(dim=0)
    if gate.dim() == 1:
        return dgate.sum(dim=(0, 1)).view(gate.shape[0], -1).sum(dim=1).to(gate.dtype)
    return reduce_to_heads(dgate, gate)

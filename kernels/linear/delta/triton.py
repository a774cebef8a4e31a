"""Delta rule in Triton, on CUDA: DeltaNet, Gated DeltaNet and KDA.

Implements the passes of `longctx.kernels.linear.recurrence.LinearRecurrence` for float32, bf16 and fp16, with the
equations of `longctx.kernels.linear.delta.chunked`. The gates are `(beta,)` or `(beta, log_decay)`, beta `[B, T, H]`,
log_decay `[B, T, H]` or `[B, T, H, K]`, at most 0.

Each pass first prepares all chunks of C tokens in parallel (`triton_prepare`: the inverse of a chunk's triangular
system, its scores, and its decays), then scans chunks in order, with one program per sequence, head, segment and tile
of V (`triton_chunk_scan`). Backward scans twice, forward for the states before the chunks and in reverse for the
gradients of the states after them, and ends with two kernels that are parallel over chunks (`triton_grads`). Vector
decays have their own kernels for what is parallel over chunks (`triton_vector`).

HBM traffic in bytes per token and head, with e bytes per element, p bytes per factor (2 in bf16, else 4), D = K = V,
one query head per state, all of V in one tile, and not counting the states between segments (4 D^2 to 16 D^2 per
segment and pass) nor numbers per token (4 per gate, decay or sum that a kernel reads or writes):

                      no decay, scalar                      vector, in float32
    summarize         3De + 2Cp                             2De + 2Cp + 4Dp + 4D
    apply             6De + 4Cp                             4De + 4Cp + 6Dp + 4D
    summarize_grad    5De + 4Cp                             3De + 4Cp + 6Dp + 4D
    apply_grad        18De + 9Cp + 3Dp + 4 D^2 p / C        12De + 5Cp + 10Dp + 4 D^2 p / C + 8D, dgates 4D more
    KiB at D = 128 in bf16, C = 64 and 32: forward 3.0, 5.4; backward 10.1, 14.4 with dgates

For vector decays, the scans load keys and queries that are decayed already, so that they compute no exponentials.

Intermediate results between kernels are kept for as many segments at a time as fit in SCRATCH bytes, at least one, and
freed when the pass returns: Cp (1 + readers) + 12 per token and head, Dp (2 + readers) more for vector decays, and in
apply_grad Dp + 2 D^2 p / C more, and Cp (1 + readers) more for the others. At D = 128 in bf16 that is 1.75 KiB for no
and scalar decays, and 3.2 KiB for vector decays.

float32 products are exact (IEEE), or tf32 if `torch.backends.cuda.matmul.allow_tf32` is set. In bf16 the factors, and
with them inverses, scores and the states stored for the backward pass, are rounded to bf16 and summed in float32. In
fp16 they are float32, multiplied as tf32, but for dv, which kernels read again. Recurrent states and the gradients of
gates are float32. Heads group as in `longctx.kernels.linear.additive.triton`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear import tuning
from longctx.kernels.linear.delta import triton_vector
from longctx.kernels.linear.delta.triton_chunk_scan import backward_kernel, forward_kernel
from longctx.kernels.linear.delta.triton_grads import grads_kernel, pair_grads_kernel
from longctx.kernels.linear.delta.triton_prepare import prepare_kernel
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.linear.triton_launch import (
    LaunchPlan,
    Strides,
    after_last_start,
    allocate_grad,
    before_first_start,
    bounds_tensor,
    document_start_mask,
    gate_with_strides,
    maybe_with_strides,
    plan_launch,
    reduce_to_heads,
    segment_document_ids,
    segment_length,
    with_strides,
)

__all__ = ["apply", "apply_grad", "segment_length", "summarize", "summarize_grad"]

SCRATCH = 2**30
"""Bytes of intermediate results between kernels."""
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _SegmentGroup:
    """Consecutive segments `at` whose chunks are in SCRATCH at the same time."""

    plan: LaunchPlan
    at: slice
    bounds: Bounds
    chunk: int

    @cached_property
    def chunks(self) -> int:
        """Chunk slots per segment: the chunks of the longest one."""
        return max(-(-(end - begin) // self.chunk) for begin, end in self.bounds)

    @property
    def slots(self) -> int:
        """Chunk slots of all segments, sequences and heads."""
        return len(self.bounds) * self.chunks * self.plan.batch * self.plan.heads

    @property
    def device_bounds(self) -> Tensor:
        """Begin and end token of each segment, on the device."""
        return bounds_tensor(self.bounds, self.plan.device)

    def scratch(self, *shape: int) -> Tensor:
        """Allocate `[slots, *shape]` in the dtype of products."""
        return torch.empty(self.slots, *shape, dtype=self.plan.dot_dtype, device=self.plan.device)

    def tile_sizes(self, name: str) -> tuning.TileSizes:
        """Return a kernel's tile sizes, with the chunk size of `prepare_kernel`."""
        return {**self.plan.tile_sizes(name), "chunk": self.chunk}

    def launch_over_chunks(self, kernel: Any, name: str, blocks: int, *arguments: Any, **constants: Any) -> None:
        """Launch `blocks` programs per chunk slot."""
        self.plan.launch(kernel, self.tile_sizes(name), blocks * self.slots, *arguments, self.chunks, **constants)

    def launch_over_segments(
        self, kernel: Any, name: str, value_dims: Sequence[int], *arguments: Any, **constants: Any
    ) -> None:
        """Launch a program per segment, sequence, head and tile of each of `value_dims`."""
        sizes = self.tile_sizes(name)
        programs = sum(-(-dim // sizes["block_v"]) for dim in value_dims)
        programs *= len(self.bounds) * self.plan.batch * self.plan.heads
        self.plan.launch(kernel, sizes, programs, *arguments, self.chunks, **constants)


class _Call:
    """Kernel arguments of one pass: tensors with strides, document ids, grouping constants."""

    def __init__(self, inputs: Inputs, segments: Sequence[Segment], *, queries: bool, ids: bool) -> None:
        """`queries`: the kernels read q; `ids`: they read each token's document."""
        self.beta, *decay = inputs.gates
        self.plan = plan = plan_launch("delta", inputs, decay[0] if decay else None, segments, queries)
        self.chunk = plan.tile_sizes("prepare")["chunk"]
        q, k, v = inputs.q if queries else None, inputs.k, inputs.v
        self.q, self.k, self.v = maybe_with_strides(q), with_strides(k), with_strides(v)
        self.gates: tuple[Tensor, Strides, Tensor, Strides] = (*gate_with_strides(self.beta), *plan.gate)
        self.ids = segment_document_ids(plan.segments, plan.device) if ids else None
        self.group_sizes = {
            **plan.group_sizes(k if q is None else q, k, v),
            "BETA_GROUP": plan.heads // self.beta.shape[2],
        }

    def kernel_groups(self, *names: str) -> dict[str, int]:
        """Return the grouping constants of the tensors that a kernel reads."""
        return {f"{name}_GROUP": self.group_sizes[f"{name}_GROUP"] for name in names} | {
            "READERS": self.group_sizes["READERS"]
        }

    def state(self, *shape: int) -> Tensor:
        """Allocate a state per segment, `[N, B, H, *shape]`, float32."""
        return torch.empty(*self.plan.state_shape[:3], *shape, dtype=torch.float32, device=self.plan.device)

    def segment_groups(self, bounds: Bounds, bytes_per_chunk: int) -> Iterator[_SegmentGroup]:
        """Yield the segments in order, as many at a time as fit in SCRATCH."""
        plan = self.plan
        longest = max((end - begin for begin, end in bounds), default=0)
        one = -(-longest // self.chunk) * plan.batch * plan.heads * bytes_per_chunk
        count = max(1, SCRATCH // max(one, 1))
        for first in range(0, len(bounds), count):
            at = slice(first, min(first + count, len(bounds)))
            yield _SegmentGroup(plan, at, bounds[at], self.chunk)

    def chunk_bytes(self, *, scores: bool, states: bool = False) -> int:
        """Return the bytes of intermediate results per chunk and head."""
        plan = self.plan
        vector = plan.decay_kind == "vector"
        numbers = self.chunk**2 * (1 + plan.readers * scores)
        if vector:
            numbers += self.chunk * plan.key_dim * (2 + plan.readers * scores)
        if states:
            numbers += plan.value_dim * (2 * plan.key_dim + self.chunk)
            numbers += 0 if vector else self.chunk**2 * (1 + plan.readers)
        return numbers * plan.dot_dtype.itemsize + (4 * plan.key_dim if vector else 12 * self.chunk)

    def prepare(self, group: _SegmentGroup, *, scores: bool) -> tuple[Tensor | None, ...]:
        """Run `prepare_kernel`: inverse, scores, factors, decayed_k, written_k, decayed_q, keeps; None where unused."""
        plan, chunk = self.plan, self.chunk
        inverse = group.scratch(chunk, chunk)
        scores_out = group.scratch(plan.readers, chunk, chunk) if scores else None
        factors = None
        decayed: tuple[Tensor | None, ...] = (None, None, None, None)
        if plan.decay_kind == "vector":
            decayed_k, written_k = (group.scratch(chunk, plan.key_dim) for _ in range(2))
            decayed_q = group.scratch(plan.readers, chunk, plan.key_dim) if scores else None
            keeps = torch.empty(group.slots, plan.key_dim, dtype=torch.float32, device=plan.device)
            decayed = decayed_k, written_k, decayed_q, keeps
        else:
            factors = torch.empty(group.slots, 3, chunk, dtype=torch.float32, device=plan.device)
        group.launch_over_chunks(
            triton_vector.prepare_kernel if plan.decay_kind == "vector" else prepare_kernel,
            "prepare",
            1,
            *self.q,
            *self.k,
            *self.gates,
            self.ids,
            group.device_bounds,
            inverse,
            scores_out,
            *(decayed if plan.decay_kind == "vector" else (factors,)),
            **self.kernel_groups("Q", "K", "BETA", "GATE"),
        )
        return inverse, scores_out, factors, *decayed

    def carry(self, transition: Tensor, state: Tensor) -> Carry:
        """Return the segments' carries, with a zero transition where a document starts."""
        has_start = document_start_mask(self.plan.segments, self.plan.device)
        if has_start is not None:
            transition.masked_fill_(has_start.view(-1, 1, 1, 1, 1), 0.0)
        return Carry(transition, state)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1: each segment's carry; transition `[N, B, H, K, K]`, state `[N, B, H, K, V]`, float32.

    Reads only the last document of a segment. This pass and those below raise ValueError for dtypes and head dims that
    the kernels do not support.
    """
    call = _Call(inputs, segments, queries=False, ids=False)
    key_dim, value_dim = call.plan.key_dim, call.plan.value_dim
    transition, state = call.state(key_dim, key_dim), call.state(key_dim, value_dim)
    for group in call.segment_groups(after_last_start(segments), call.chunk_bytes(scores=False)):
        prepared = call.prepare(group, scores=False)
        group.launch_over_segments(
            forward_kernel,
            "forward",
            (value_dim, key_dim),
            *maybe_with_strides(None),
            *call.k,
            *call.v,
            group.device_bounds,
            *prepared,
            None,
            *maybe_with_strides(None),
            state[group.at],
            transition[group.at],
            None,
            None,
            **call.kernel_groups("Q", "K", "V"),
        )
    return call.carry(transition, state)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2: o `[B, T, Ho, V]` in v's dtype, and the end states `[N, B, H, K, V]`, float32."""
    call = _Call(inputs, segments, queries=True, ids=True)
    plan, q, v = call.plan, inputs.queries, inputs.v
    out = torch.empty(*q.shape[:2], plan.heads * plan.readers, v.shape[3], dtype=v.dtype, device=v.device)
    ends, states = call.state(plan.key_dim, plan.value_dim), states.contiguous()
    for group in call.segment_groups(plan.bounds, call.chunk_bytes(scores=True)):
        prepared = call.prepare(group, scores=True)
        group.launch_over_segments(
            forward_kernel,
            "forward",
            (plan.value_dim,),
            *call.q,
            *call.k,
            *call.v,
            group.device_bounds,
            *prepared,
            states[group.at],
            *with_strides(out),
            ends[group.at],
            None,
            None,
            None,
            **call.kernel_groups("Q", "K", "V"),
        )
    return out, ends


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward: each segment's carry of gradients, shapes as in `summarize`.

    Reads only the shape of v, and only the tokens before a segment's first document start.
    """
    call = _Call(inputs, segments, queries=True, ids=False)
    key_dim, value_dim = call.plan.key_dim, call.plan.value_dim
    transition, state = call.state(key_dim, key_dim), call.state(key_dim, value_dim)
    for group in call.segment_groups(before_first_start(segments), call.chunk_bytes(scores=True)):
        prepared = call.prepare(group, scores=True)
        group.launch_over_segments(
            backward_kernel,
            "backward",
            (value_dim, key_dim),
            *call.q,
            *call.k,
            *with_strides(do),
            group.device_bounds,
            *prepared,
            None,
            state[group.at],
            transition[group.at],
            None,
            *maybe_with_strides(None),
            **call.kernel_groups("Q", "K"),
        )
    return call.carry(transition, state)


def apply_grad(
    inputs: Inputs,
    segments: Sequence[Segment],
    do: Tensor,
    states: Tensor,
    dends: Tensor,
    gate_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward: dq, dk, dv and dgates in the dtypes of q, k, v and gates, and the gradient of `states`, float32.

    Five launches per group of segments that fits in SCRATCH, four for vector decays: prepare, the forward and reverse
    scans, and gradients.
    """
    call = _Call(inputs, segments, queries=True, ids=True)
    plan, q, k, v = call.plan, inputs.queries, inputs.k, inputs.v
    key_dim, value_dim, heads = plan.key_dim, plan.value_dim, plan.heads
    states, dends = states.contiguous(), dends.contiguous()
    dstates = torch.empty_like(dends)
    dq, dk, dv = allocate_grad(q, heads * plan.readers), allocate_grad(k, heads), allocate_grad(v, heads)
    grads_out = with_strides(do)
    vector = plan.decay_kind == "vector"
    k_blocks = -(-key_dim // plan.tile_sizes("grads")["block_k"])
    # The gradients of gates per token in parts: one per block of K, and before them one for pairs of tokens.
    parts = ((k_blocks + (not vector)) * plan.batch, plan.length, heads)
    dbeta = torch.empty(parts, dtype=torch.float32, device=q.device) if gate_grads else None
    dgate = None
    if gate_grads and plan.log_decay is not None:
        shape = (plan.batch, plan.length, heads, key_dim) if vector else parts
        dgate = torch.empty(shape, dtype=torch.float32, device=q.device)
    for group in call.segment_groups(plan.bounds, call.chunk_bytes(scores=True, states=True)):
        prepared = call.prepare(group, scores=True)
        chunk_states, chunk_dstates = (group.scratch(value_dim, key_dim) for _ in range(2))
        z = group.scratch(value_dim, call.chunk)
        group.launch_over_segments(
            forward_kernel,
            "forward",
            (value_dim,),
            *maybe_with_strides(None),
            *call.k,
            *call.v,
            group.device_bounds,
            *prepared,
            states[group.at],
            *maybe_with_strides(None),
            None,
            None,
            chunk_states,
            z,
            **call.kernel_groups("Q", "K", "V"),
        )
        group.launch_over_segments(
            backward_kernel,
            "backward",
            (value_dim,),
            *call.q,
            *call.k,
            *grads_out,
            group.device_bounds,
            *prepared,
            dends[group.at],
            dstates[group.at],
            None,
            chunk_dstates,
            *with_strides(dv),
            **call.kernel_groups("Q", "K"),
        )
        gates_out = (*_maybe_gate_with_strides(dbeta), *_maybe_gate_with_strides(dgate))
        if vector:
            group.launch_over_chunks(
                triton_vector.grads_kernel,
                "grads",
                k_blocks,
                *call.q,
                *call.k,
                *with_strides(dv),
                *grads_out,
                *call.gates,
                call.ids,
                group.device_bounds,
                chunk_states,
                chunk_dstates,
                z,
                *with_strides(dq),
                *with_strides(dk),
                *gates_out,
                **call.kernel_groups("Q", "K", "BETA", "GATE"),
            )
            continue
        key_pairs = group.scratch(call.chunk, call.chunk)
        query_pairs = group.scratch(plan.readers, call.chunk, call.chunk)
        group.launch_over_chunks(
            pair_grads_kernel,
            "pairs",
            1,
            *call.q,
            *call.k,
            *with_strides(dv),
            *grads_out,
            *call.gates,
            call.ids,
            group.device_bounds,
            z,
            key_pairs,
            query_pairs,
            *gates_out,
            **call.kernel_groups("Q", "K", "BETA", "GATE"),
        )
        group.launch_over_chunks(
            grads_kernel,
            "grads",
            k_blocks,
            *call.q,
            *call.k,
            *with_strides(dv),
            *grads_out,
            group.device_bounds,
            prepared[2],
            chunk_states,
            chunk_dstates,
            z,
            key_pairs,
            query_pairs,
            *with_strides(dq),
            *with_strides(dk),
            *gates_out,
            **call.kernel_groups("Q", "K"),
        )
    dgates = tuple(
        None if grad is None else _gate_grad(grad, gate, plan.batch)
        for grad, gate in zip((dbeta, dgate), inputs.gates, strict=False)
    )
    return reduce_to_heads(dq, q), reduce_to_heads(dk, k), reduce_to_heads(dv, v), dgates, dstates


def _maybe_gate_with_strides(x: Tensor | None) -> tuple[Tensor | None, Strides]:
    return (None, (0, 0, 0)) if x is None else (x, (x.stride(0), x.stride(1), x.stride(2)))


def _gate_grad(grad: Tensor, gate: Tensor, batch: int) -> Tensor:
    """Reduce the gradient per state (and for `[B, T, H]` gates per block of K) to a gate's shape and dtype."""
    if gate.dim() == 3:
        grad = grad.unflatten(0, (-1, batch)).sum(dim=0)
    return reduce_to_heads(grad, gate)

"""Delta rule in Triton, on CUDA: DeltaNet, Gated DeltaNet and KDA.

Implements the passes of `longctx.kernels.linear.recurrence.LinearRecurrence` for float32, bf16 and fp16, with the
equations of `longctx.kernels.linear.delta.chunked`. The gates are `(beta,)` or `(beta, log_decay)`, beta `[B, T, H]`,
log_decay `[B, T, H]` or `[B, T, H, K]`, at most 0.

Each pass prepares all chunks of C tokens in parallel (`triton_prepare`: the inverse of a chunk's triangular system, its
scores, and its decays), then scans chunks in order, with one program per sequence, head, segment and tile of V
(`triton_chunk_scan`). Backward scans twice, forward for the states before the chunks and in reverse for the gradients
of the states after them, and ends with two kernels that are parallel over chunks (`triton_grads`). Vector decays have
their own kernels for what is parallel over chunks (`triton_vector`).

The inverses and decays per token are the same in both passes of a direction, and `prepare` makes them once for both:
chunks begin where segments do, in every pass, and a pass that needs only a segment's last or first document scans the
chunks in which it is. They are not kept from forward to backward, since they would be a sixth of k, q and v in bf16.

HBM traffic in bytes per token and head, with e bytes per element, p bytes per factor (2 in bf16, else 4), D = K = V,
one query head per state, all of V in one tile, and not counting the states between segments (4 D^2 to 16 D^2 per
segment and pass) nor numbers per token (4 per gate, decay or sum that a kernel reads or writes):

                      no decay, scalar                      vector, in float32
    prepare           De + Cp                               -
    summarize         2De + Cp                              2De + 2Cp + 4Dp + 4D
    apply             6De + 3Cp                             4De + 4Cp + 6Dp + 4D
    summarize_grad    5De + 3Cp                             3De + 4Cp + 6Dp + 4D
    apply_grad        18De + 8Cp + 3Dp + 4 D^2 p / C        13De + 9Cp + 11Dp + 4 D^2 p / C + 9.5D, dgates 4D more
    KiB at D = 128 in bf16, C = 64: forward 2.9, 5.8; backward 10.3, 14.1 with dgates

For vector decays, the scans load keys and queries that are decayed already, so that they compute no exponentials.

Intermediate results between kernels are kept for as many segments at a time as fit in SCRATCH bytes, at least one, and
freed when the pass returns: Cp (1 + readers) + 12 per token and head, Dp (2 + readers) more for vector decays, and in
apply_grad Dp + 2 D^2 p / C + Cp (1 + readers) more, and 0.75 D for vector decays. At D = 128 in bf16 that is 1.75 KiB
for no and scalar decays, and 2.6 KiB for vector decays. Of this `prepare` keeps Cp + 12 between the passes, for as many
segments, from the first on, as fit in another SCRATCH bytes (at C = 64 in bf16 7.7 million tokens times heads); each
pass makes those of the others again.

float32 products are exact (IEEE), or tf32 if torch's matmul may use it (`fp32_precision`); scores of vector decays and
their gradients are tf32x3 in place of IEEE, accurate to about 1e-6. In bf16 the factors, and
with them inverses, scores and the states stored for the backward pass, are rounded to bf16 and summed in float32. In
fp16 they are float32, multiplied as tf32, but for dv, which kernels read again. Recurrent states and the gradients of
gates are float32. Heads group as in `longctx.kernels.linear.additive.triton`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    allocate_grad,
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
from longctx.kernels.linear.triton_pairs import factor_kinds

__all__ = [
    "allocate_prepared",
    "apply",
    "apply_grad",
    "prepare",
    "segment_length",
    "summarize",
    "summarize_grad",
]

SCRATCH = 2**30
"""Bytes of intermediate results between kernels, and as many of what `prepare` keeps between passes."""
Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _SegmentGroup:
    """Consecutive segments `at` whose chunks are in SCRATCH at the same time."""

    plan: LaunchPlan
    at: slice
    chunk: int
    chunks: int
    """Chunk slots per segment: the chunks of the longest one of the call."""
    walks: Bounds | None
    """Chunks of each segment that a scan runs over, the first one and the one after the last; None for all."""
    prepared: tuple[Tensor, ...]
    """Inverse and factors of these segments, where `Inputs.prepared` has them."""

    @property
    def bounds(self) -> Bounds:
        """Begin and end token of each segment."""
        return self.plan.bounds[self.at]

    @property
    def slots(self) -> int:
        """Chunk slots of all segments, sequences and heads."""
        return len(self.bounds) * self.chunks * self.plan.batch * self.plan.heads

    @property
    def device_bounds(self) -> Tensor:
        """Begin and end token of each segment, on the device."""
        return bounds_tensor(self.bounds, self.plan.device)

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate `[slots, *shape]`, by default in the dtype of products."""
        return torch.empty(self.slots, *shape, dtype=dtype or self.plan.dot_dtype, device=self.plan.device)

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

    @property
    def scanned(self) -> tuple[Tensor, Tensor | None]:
        """Arguments of a scan: `device_bounds`, and `walks` on the device."""
        walks = None if self.walks is None else bounds_tensor(self.walks[self.at], self.plan.device)
        return self.device_bounds, walks


class _Call:
    """Kernel arguments of one pass: tensors with strides, document ids, grouping constants."""

    def __init__(self, inputs: Inputs, segments: Sequence[Segment], *, queries: bool) -> None:
        """`queries`: the kernels read q."""
        self.beta, *decay = inputs.gates
        self.plan = plan = plan_launch("delta", inputs, decay[0] if decay else None, segments, queries)
        self.chunk = plan.tile_sizes("prepare")["chunk"]
        self.chunks = max((-(-segment.size // self.chunk) for segment in plan.segments), default=0)
        self.prepared = inputs.prepared
        q, k, v = inputs.q if queries else None, inputs.k, inputs.v
        self.q, self.k, self.v = maybe_with_strides(q), with_strides(k), with_strides(v)
        self.gates: tuple[Tensor, Strides, Tensor, Strides] = (*gate_with_strides(self.beta), *plan.gate)
        self.ids = segment_document_ids(plan.segments, plan.device)
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

    @property
    def prepared_bytes(self) -> int:
        """Bytes per segment of what `prepare` keeps: an inverse and factors per chunk."""
        per_chunk = self.chunk**2 * self.plan.dot_dtype.itemsize + 12 * self.chunk
        return self.chunks * self.plan.batch * self.plan.heads * per_chunk

    def allocate_prepared(self) -> tuple[Tensor, ...]:
        """Allocate the inverse `[n, chunks, B, H, C, C]` and factors `[n, chunks, B, H, 3, C]` of the first n segments.

        As many as fit in SCRATCH. Nothing for vector decays.
        """
        plan, count = self.plan, min(len(self.plan.segments), SCRATCH // max(self.prepared_bytes, 1))
        if plan.decay_kind == "vector" or not count:
            return ()
        shape = count, self.chunks, plan.batch, plan.heads
        inverse = torch.empty(*shape, self.chunk, self.chunk, dtype=plan.dot_dtype, device=plan.device)
        return inverse, torch.empty(*shape, 3, self.chunk, dtype=torch.float32, device=plan.device)

    def segment_groups(self, bytes_per_chunk: int, walks: Bounds | None = None) -> Iterator[_SegmentGroup]:
        """Yield the segments in order, as many at a time as fit in SCRATCH: first those that are prepared."""
        plan, kept = self.plan, len(self.prepared[0]) if self.prepared else 0
        for begin, end in ((0, kept), (kept, len(plan.segments))):
            one = self.chunks * plan.batch * plan.heads * bytes_per_chunk
            if begin < kept:
                one -= self.prepared_bytes
            count = max(1, SCRATCH // max(one, 1))
            for first in range(begin, end, count):
                at = slice(first, min(first + count, end))
                prepared = tuple(x[at] for x in self.prepared) if begin < kept else ()
                yield _SegmentGroup(plan, at, self.chunk, self.chunks, walks, prepared)

    def chunk_bytes(self, *, scores: bool, states: bool = False) -> int:
        """Return the bytes of intermediate results per chunk and head, of segments that are not prepared."""
        plan = self.plan
        vector = plan.decay_kind == "vector"
        numbers = self.chunk**2 * (1 + plan.readers * scores)
        if vector:
            numbers += self.chunk * plan.key_dim * (2 + plan.readers * scores)
        if states:
            numbers += plan.value_dim * (2 * plan.key_dim + self.chunk) + self.chunk**2 * (1 + plan.readers)
            if vector:
                numbers += factor_kinds(self.chunk) * self.chunk // 16 * plan.key_dim * 4 // plan.dot_dtype.itemsize
        return numbers * plan.dot_dtype.itemsize + (4 * plan.key_dim if vector else 12 * self.chunk)

    def prepare(
        self, group: _SegmentGroup, *, scores: bool, block_factors: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return inverse, scores, factors, decayed_k, written_k, decayed_q, keeps; None where unused.

        Runs `prepare_kernel` for those that the group does not have. Fills `block_factors` for the gradients of vector
        decays.
        """
        plan, chunk = self.plan, self.chunk
        scores_out = group.scratch(plan.readers, chunk, chunk) if scores else None
        if plan.decay_kind == "vector":
            inverse = group.scratch(chunk, chunk)
            decayed_k, written_k = (group.scratch(chunk, plan.key_dim) for _ in range(2))
            decayed_q = group.scratch(plan.readers, chunk, plan.key_dim) if scores else None
            keeps = torch.empty(group.slots, plan.key_dim, dtype=torch.float32, device=plan.device)
            decayed = decayed_k, written_k, decayed_q, keeps
            self.launch_prepare(triton_vector.prepare_kernel, group, inverse, scores_out, *decayed, block_factors)
            return inverse, scores_out, None, *decayed
        if not group.prepared:
            inverse = group.scratch(chunk, chunk)
            factors = torch.empty(group.slots, 3, chunk, dtype=torch.float32, device=plan.device)
            self.launch_prepare(prepare_kernel, group, inverse, scores_out, factors)
        else:
            inverse, factors = group.prepared
            if scores:
                self.launch_prepare(prepare_kernel, group, None, scores_out, None)
        return inverse, scores_out, factors, None, None, None, None

    def launch_prepare(self, kernel: Any, group: _SegmentGroup, *results: Tensor | None) -> None:
        """Launch a `prepare_kernel`, which writes those results that are not None."""
        arguments = *self.q, *self.k, *self.gates, self.ids, group.device_bounds, *results
        group.launch_over_chunks(kernel, "prepare", 1, *arguments, **self.kernel_groups("Q", "K", "BETA", "GATE"))

    def carry(self, transition: Tensor, state: Tensor) -> Carry:
        """Return the segments' carries, with a zero transition where a document starts."""
        has_start = document_start_mask(self.plan.segments, self.plan.device)
        if has_start is not None:
            transition.masked_fill_(has_start.view(-1, 1, 1, 1, 1), 0.0)
        return Carry(transition, state)


def allocate_prepared(inputs: Inputs, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """Allocate what `prepare` returns."""
    return _Call(inputs, segments, queries=False).allocate_prepared()


def prepare(inputs: Inputs, segments: Sequence[Segment]) -> list[Tensor]:
    """Invert the triangular systems of as many segments, the first ones, as fit in SCRATCH, for both passes.

    The largest part of what the passes prepare: Cp + 12 bytes per token and head. Scores, which only apply needs in
    the forward direction, and all of the segments beyond SCRATCH are made by each pass. Vector decays keep nothing:
    their passes need decayed keys too, 2D / C times as many numbers.
    """
    call = _Call(inputs, segments, queries=False)
    prepared = call.allocate_prepared()
    if prepared:
        inverse, factors = prepared
        group = _SegmentGroup(call.plan, slice(0, len(inverse)), call.chunk, call.chunks, None, prepared)
        call.launch_prepare(prepare_kernel, group, inverse, None, factors)
    return list(prepared)


def _walks(
    segments: Sequence[Segment], first: Callable[[Segment], int], last: Callable[[Segment], int]
) -> Bounds | None:
    """Return the chunks `[first, last)` of each segment; None, for all chunks, where no document starts."""
    if not any(segment.starts for segment in segments):
        return None
    return tuple((first(segment), last(segment)) for segment in segments)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1: each segment's carry; transition `[N, B, H, K, K]`, state `[N, B, H, K, V]`, float32.

    Scans a segment from the chunk in which its last document starts. This pass and those below raise ValueError for
    dtypes and head dims that the kernels do not support.
    """
    call = _Call(inputs, segments, queries=False)
    key_dim, value_dim = call.plan.key_dim, call.plan.value_dim
    transition, state = call.state(key_dim, key_dim), call.state(key_dim, value_dim)
    chunk = call.chunk
    walks = _walks(segments, lambda s: s.starts[-1] // chunk if s.starts else 0, lambda s: -(-s.size // chunk))
    for group in call.segment_groups(call.chunk_bytes(scores=False), walks):
        prepared = call.prepare(group, scores=False)
        group.launch_over_segments(
            forward_kernel,
            "forward",
            (value_dim, key_dim),
            *maybe_with_strides(None),
            *call.k,
            *call.v,
            *group.scanned,
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
    call = _Call(inputs, segments, queries=True)
    plan, q, v = call.plan, inputs.queries, inputs.v
    out = torch.empty(*q.shape[:2], plan.heads * plan.readers, v.shape[3], dtype=v.dtype, device=v.device)
    ends, states = call.state(plan.key_dim, plan.value_dim), states.contiguous()
    for group in call.segment_groups(call.chunk_bytes(scores=True)):
        prepared = call.prepare(group, scores=True)
        group.launch_over_segments(
            forward_kernel,
            "forward",
            (plan.value_dim,),
            *call.q,
            *call.k,
            *call.v,
            *group.scanned,
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

    Reads only the shape of v. Scans a segment up to the chunk in which its first document starts.
    """
    call = _Call(inputs, segments, queries=True)
    key_dim, value_dim = call.plan.key_dim, call.plan.value_dim
    transition, state = call.state(key_dim, key_dim), call.state(key_dim, value_dim)
    chunk = call.chunk
    walks = _walks(segments, lambda s: 0, lambda s: -(-(s.starts[0] if s.starts else s.size) // chunk))
    for group in call.segment_groups(call.chunk_bytes(scores=True), walks):
        prepared = call.prepare(group, scores=True)
        group.launch_over_segments(
            backward_kernel,
            "backward",
            (value_dim, key_dim),
            *call.q,
            *call.k,
            *with_strides(do),
            *group.scanned,
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
    call = _Call(inputs, segments, queries=True)
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
    for group in call.segment_groups(call.chunk_bytes(scores=True, states=True)):
        block_factors = None
        if vector:
            kinds = factor_kinds(call.chunk)
            block_factors = group.scratch(kinds, call.chunk // 16, key_dim, dtype=torch.float32)
        prepared = call.prepare(group, scores=True, block_factors=block_factors)
        chunk_states, chunk_dstates = (group.scratch(value_dim, key_dim) for _ in range(2))
        z = group.scratch(value_dim, call.chunk)
        group.launch_over_segments(
            forward_kernel,
            "forward",
            (value_dim,),
            *maybe_with_strides(None),
            *call.k,
            *call.v,
            *group.scanned,
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
            *group.scanned,
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
            score_grads = group.scratch(1 + plan.readers, call.chunk, call.chunk)
            group.launch_over_chunks(
                triton_vector.score_grads_kernel,
                "grads",
                1,
                *with_strides(dv),
                *grads_out,
                call.ids,
                group.device_bounds,
                z,
                score_grads,
                READERS=plan.readers,
            )
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
                score_grads,
                prepared[-1],  # keeps
                block_factors,
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
            prepared[2],  # factors
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

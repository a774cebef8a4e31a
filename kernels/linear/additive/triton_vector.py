"""Additive recurrence with vector decays in Triton, on CUDA: GLA and HGRN-2.

Host side of `longctx.kernels.linear.additive.triton_vector_kernels`, called by
`longctx.kernels.linear.additive.triton`, which has the summaries. Output and gradients first prepare all chunks of C
tokens in parallel (scores, decayed queries and keys), then walk over chunks with products of tensor cores only, one
program per sequence, head, segment and tile of V. Backward walks twice, forward for the states before the chunks and in
reverse for the gradients of the states after them, and ends with a kernel that is parallel over chunks.

HBM traffic in bytes per token and head, with e bytes per element, p bytes per factor (2 in bf16, else 4), D = K = V,
one query head per state, float32 log-decays, and not counting the states between segments (4 D^2 per segment and pass)
nor what programs for other tiles of K or V read again from the L2 cache:

    apply         4De + 4D + 4Dp + 2Cp        prepare     2De + 4D + 2Dp + Cp
                                              forward     2De + 2Dp + Cp
    apply_grad    13De + 9.5D + 5Dp + 4Cp     prepare     4De + 4.75D + 2Dp + 2Cp
                  + 4 D^2 p / C               forward     De + Dp + D^2 p / C
                  dgates 4D more              backward    2De + 2Dp + Cp + D^2 p / C
                                              grads       6De + 4.75D + Cp + 2 D^2 p / C
    KiB at D = 128 in bf16 and C = 64, summaries included: forward 3.8; backward 9.2, with dgates 9.7

Intermediate results between kernels are kept for as many segments at a time as fit in SCRATCH bytes, at least one, and
freed when the pass returns: (C + D) p per query head and Dp per token and head, and Cp per query head, 0.75 D and
2 D^2 p / C more in apply_grad. At D = 128 in bf16 that is 0.6 and 1.8 KiB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longctx.kernels.linear import tuning
from longctx.kernels.linear.additive.triton_vector_kernels import (
    backward_kernel,
    forward_kernel,
    grads_kernel,
    prepare_kernel,
)
from longctx.kernels.linear.recurrence import GateGrads, Inputs, Segment
from longctx.kernels.linear.triton_launch import (
    allocate_grad,
    bounds_tensor,
    maybe_with_strides,
    plan_launch,
    reduce_to_heads,
    segment_document_ids,
    with_strides,
)
from longctx.kernels.linear.triton_pairs import factor_kinds

SCRATCH = 2**30
"""Bytes of intermediate results between kernels."""


@dataclass(frozen=True)
class _SegmentGroup:
    """Consecutive segments `at` whose chunks are in SCRATCH at the same time; a slot of memory per chunk."""

    call: "_Call"
    at: slice

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Begin and end token of each segment."""
        return self.call.plan.bounds[self.at]

    @cached_property
    def chunks(self) -> int:
        """Slots per segment: the chunks of the longest one."""
        return max(-(-(end - begin) // self.call.chunk) for begin, end in self.bounds)

    @property
    def slots(self) -> int:
        """Slots of all segments, sequences and heads."""
        return len(self.bounds) * self.chunks * self.call.plan.batch * self.call.plan.heads

    @property
    def device_bounds(self) -> Tensor:
        """Begin and end token of each segment, on the device."""
        return bounds_tensor(self.bounds, self.call.plan.device)

    def scratch(self, *shape: int) -> Tensor:
        """Allocate `[slots, *shape]` in the dtype of products."""
        return torch.empty(self.slots, *shape, dtype=self.call.plan.dot_dtype, device=self.call.plan.device)

    def numbers(self, *shape: int) -> Tensor:
        """Allocate `[slots, *shape]` in float32."""
        return torch.empty(self.slots, *shape, dtype=torch.float32, device=self.call.plan.device)

    def launch_over_chunks(self, kernel: Any, name: str, blocks: int, *arguments: Any, **constants: Any) -> None:
        """Launch `blocks` programs per slot."""
        call = self.call
        call.plan.launch(kernel, call.tile_sizes(name), blocks * self.slots, *arguments, self.chunks, **constants)

    def launch_over_segments(self, kernel: Any, name: str, *arguments: Any, **constants: Any) -> None:
        """Launch a program per segment, sequence, head and tile of V."""
        plan, sizes = self.call.plan, self.call.tile_sizes(name)
        programs = -(-plan.value_dim // sizes["block_v"]) * len(self.bounds) * plan.batch * plan.heads
        plan.launch(kernel, sizes, programs, *arguments, self.chunks, READERS=plan.readers, **constants)


class _Call:
    """Kernel arguments of one pass."""

    def __init__(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor | None = None) -> None:
        self.plan = plan = plan_launch("additive", inputs, inputs.gates[0], segments, queries=True)
        self.chunk = plan.tile_sizes("prepare")["chunk"]
        self.v, self.do = with_strides(inputs.v), maybe_with_strides(do)
        self.arguments: list[Any] = [*with_strides(inputs.queries), *with_strides(inputs.k), *self.v, *self.do]
        self.arguments += [*plan.gate, segment_document_ids(plan.segments, plan.device)]
        self.group_sizes = plan.group_sizes(inputs.queries, inputs.k, inputs.v)

    def tile_sizes(self, name: str) -> tuning.TileSizes:
        """Return a kernel's tile sizes, with the chunk size of `prepare_kernel`."""
        return {**self.plan.tile_sizes(name), "chunk": self.chunk}

    def segment_groups(self) -> Iterator[_SegmentGroup]:
        """Yield the segments in order, as many at a time as fit in SCRATCH."""
        plan, chunk = self.plan, self.chunk
        numbers, float32 = chunk * (plan.readers * (chunk + plan.key_dim) + plan.key_dim), plan.key_dim
        if self.do[0] is not None:
            numbers += plan.readers * chunk**2 + 2 * plan.key_dim * plan.value_dim
            float32 += factor_kinds(chunk) * chunk // 16 * plan.key_dim
        bytes_per_chunk = numbers * plan.dot_dtype.itemsize + 4 * float32
        longest = max((end - begin for begin, end in plan.bounds), default=0)
        one = -(-longest // chunk) * plan.batch * plan.heads * bytes_per_chunk
        count = max(1, SCRATCH // max(one, 1))
        for first in range(0, len(plan.bounds), count):
            yield _SegmentGroup(self, slice(first, min(first + count, len(plan.bounds))))

    def prepare(self, group: _SegmentGroup) -> tuple[Tensor | None, ...]:
        """Run `prepare_kernel`: scores, score_grads, decayed_q, written_k, keeps, factors.

        score_grads and factors are for the gradients, and None without do.
        """
        plan, chunk = self.plan, self.chunk
        scores = group.scratch(plan.readers, chunk, chunk)
        score_grads = factors = None
        if self.do[0] is not None:
            score_grads = torch.empty_like(scores)
            factors = group.numbers(factor_kinds(chunk), chunk // 16, plan.key_dim)
        decayed_q = group.scratch(plan.readers, chunk, plan.key_dim)
        written_k = group.scratch(chunk, plan.key_dim)
        keeps = group.numbers(plan.key_dim)
        prepared = scores, score_grads, decayed_q, written_k, keeps, factors
        group.launch_over_chunks(
            prepare_kernel, "prepare", 1, *self.arguments, group.device_bounds, *prepared, **self.group_sizes
        )
        return prepared


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2: o `[B, T, Ho, V]` in v's dtype, and the end states `[N, B, H, K, V]`, float32."""
    call = _Call(inputs, segments)
    plan, v = call.plan, inputs.v
    out = torch.empty(
        plan.batch, plan.length, plan.heads * plan.readers, plan.value_dim, dtype=v.dtype, device=v.device
    )
    ends, states = torch.empty(plan.state_shape, dtype=torch.float32, device=v.device), states.contiguous()
    for group in call.segment_groups():
        scores, _, decayed_q, written_k, keeps, _ = call.prepare(group)
        group.launch_over_segments(
            forward_kernel,
            "apply",
            *call.v,
            group.device_bounds,
            scores,
            decayed_q,
            written_k,
            keeps,
            states[group.at],
            *with_strides(out),
            ends[group.at],
            None,
            V_GROUP=call.group_sizes["V_GROUP"],
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

    Four launches per group of segments that fits in SCRATCH: prepare, the walks forward and in reverse, and gradients.
    """
    backward = _Backward(inputs, segments, do)
    dgate = None
    if gate_grads:
        shape = (*inputs.k.shape[:2], backward.call.plan.heads, inputs.k.shape[3])
        dgate = torch.empty(shape, dtype=torch.float32, device=do.device)
    dq = backward.allocate_dq()
    dk, dv, dstates = backward.allocate_dk_dv_dstates(dends)
    backward.run(states, dends, dq, dk, dv, dgate, dstates)
    dgates = (None if dgate is None else reduce_to_heads(dgate, inputs.gates[0]),)
    q, k, v = inputs.queries, inputs.k, inputs.v
    return reduce_to_heads(dq, q), reduce_to_heads(dk, k), reduce_to_heads(dv, v), dgates, dstates


def query_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor:
    """Only dq of pass 2 backward, which needs no gradient of a state."""
    backward = _Backward(inputs, segments, do)
    dq = backward.allocate_dq()
    backward.run(states, None, dq, None, None, None, None)
    return reduce_to_heads(dq, inputs.queries)


def key_value_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward, where no gate needs a gradient: dk, dv and the gradient of the start states."""
    backward = _Backward(inputs, segments, do)
    dk, dv, dstates = backward.allocate_dk_dv_dstates(dends)
    backward.run(None, dends, None, dk, dv, None, dstates)
    return reduce_to_heads(dk, inputs.k), reduce_to_heads(dv, inputs.v), dstates


class _Backward:
    """Kernel launches of pass 2 backward."""

    def __init__(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> None:
        self.call, self.inputs = _Call(inputs, segments, do), inputs

    def allocate_dq(self) -> Tensor:
        """Allocate dq per output head."""
        return allocate_grad(self.inputs.queries, self.call.plan.heads * self.call.plan.readers)

    def allocate_dk_dv_dstates(self, dends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate dk and dv per state head, and the gradient of the start states."""
        dk, dv = (allocate_grad(x, self.call.plan.heads) for x in (self.inputs.k, self.inputs.v))
        return dk, dv, torch.empty_like(dends, memory_format=torch.contiguous_format)

    def run(
        self,
        states: Tensor | None,
        dends: Tensor | None,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        dgate: Tensor | None,
        dstates: Tensor | None,
    ) -> None:
        """Compute those that are not None: dq from `states`; dk, dv and dstates from `dends`; dgate from both."""
        call, plan = self.call, self.call.plan
        states, dends = (None if x is None else x.contiguous() for x in (states, dends))
        for group in call.segment_groups():
            scores, score_grads, decayed_q, written_k, keeps, factors = call.prepare(group)
            prepared = group.device_bounds, scores, decayed_q, written_k, keeps
            chunk_states = chunk_dstates = None
            if states is not None:
                chunk_states = group.scratch(plan.key_dim, plan.value_dim)
                group.launch_over_segments(
                    forward_kernel,
                    "apply",
                    *call.v,
                    *prepared,
                    states[group.at],
                    *maybe_with_strides(None),
                    None,
                    chunk_states,
                    V_GROUP=call.group_sizes["V_GROUP"],
                )
            if dends is not None and dstates is not None:
                chunk_dstates = group.scratch(plan.key_dim, plan.value_dim)
                group.launch_over_segments(
                    backward_kernel,
                    "dv",
                    *call.do,
                    *prepared,
                    dends[group.at],
                    *maybe_with_strides(dv),
                    chunk_dstates,
                    dstates[group.at],
                )
            group.launch_over_chunks(
                grads_kernel,
                "grads",
                -(-plan.key_dim // call.tile_sizes("grads")["block_k"]),
                *call.arguments,
                group.device_bounds,
                score_grads,
                keeps,
                factors,
                chunk_states,
                chunk_dstates,
                *maybe_with_strides(dq),
                *maybe_with_strides(dk),
                *maybe_with_strides(dgate),
                **call.group_sizes,
            )

"""Additive recurrence on CPUs, in C++: without a decay, with a constant or a scalar one, or with one per channel.

Implements the passes of `longctx.kernels.linear.additive.chunked`, which has the equations and runs what this cannot:
float64, and machines without a compiler. `longctx/kernels/native/additive.cpp` has scalar decays, and
`longctx/kernels/native/additive_vector.cpp` those per channel. Products of bfloat16 inputs are in bfloat16 where the
CPU can.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.additive import chunked
from longctx.kernels.linear.native_call import DTYPES, Grad, Pass, fields
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.native import library

FAMILY = "additive"
VECTOR_FAMILY = "additive_vector"
_TENSORS = ("q", "k", "v", "dout", "out", "dq", "dk", "dv", "gate", "dgate")
_STATES = ("states", "ends", "dends", "dstates")


class _Call(ctypes.Structure):
    """`Call` of additive.cpp."""

    _fields_ = fields(_TENSORS, (), (*_STATES, "dgate_sum"))


class _VectorCall(ctypes.Structure):
    """`Call` of additive_vector.cpp."""

    _fields_ = fields(_TENSORS, (), _STATES)


def _is_vector(inputs: Inputs) -> bool:
    return bool(inputs.gates) and inputs.gates[0].dim() == 4


def is_supported(inputs: Inputs) -> bool:
    """Return whether the native kernels take these inputs."""
    family = VECTOR_FAMILY if _is_vector(inputs) else FAMILY
    return inputs.k.device.type == "cpu" and inputs.k.dtype in DTYPES and library.is_available(family)


def _pass(inputs: Inputs, segments: Sequence[Segment]) -> Pass:
    if _is_vector(inputs):
        call = Pass(VECTOR_FAMILY, _VectorCall, inputs, segments)
    else:
        call = Pass(FAMILY, _Call, inputs, segments)
    for gate in inputs.gates:
        call.rows(gate=gate.float().expand(*inputs.k.shape[:2], -1) if gate.dim() == 1 else gate)
    return call


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """Return the whole length, one segment, as `chunked` does."""
    return chunked.segment_length(heads, length, device)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1; see `chunked`."""
    if not is_supported(inputs):
        return chunked.summarize(inputs, segments)
    call = _pass(inputs, segments)
    states = call.empty_states(segments)
    call.rows(k=inputs.k, v=inputs.v)
    call.fill(ends=states)
    call.run("summarize")
    return Carry(chunked.transitions(inputs, segments), states)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2; see `chunked`."""
    if not is_supported(inputs):
        return chunked.apply(inputs, segments, states)
    call, q, v = _pass(inputs, segments), inputs.queries, inputs.v
    out, ends = v.new_empty((*q.shape[:2], inputs.output_heads, v.shape[3])), call.empty_states(segments)
    call.rows(q=q, k=inputs.k, v=v, out=out)
    call.point(states=states)
    call.fill(ends=ends)
    call.run("apply")
    return out, ends


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.summarize_grad(inputs, segments, do)
    call = _pass(inputs, segments)
    dstates = call.empty_states(segments)
    call.rows(q=inputs.queries, dout=do)
    call.fill(dstates=dstates)
    call.run("summarize_grad")
    return Carry(chunked.transitions(inputs, segments), dstates)


def query_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor:
    """Only dq of pass 2 backward; see `chunked`, which computes it for a decay per channel."""
    if _is_vector(inputs) or not is_supported(inputs):
        return chunked.query_grad(inputs, segments, do, states)
    call, dq = _pass(inputs, segments), Grad(inputs.queries, inputs.output_heads)
    call.rows(q=inputs.queries, k=inputs.k, v=inputs.v, dout=do, dq=dq.parts)
    call.point(states=states)
    call.run("query_grad")
    return dq.value()


def key_value_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward, where no gate needs a gradient; see `chunked`, as for `query_grad`."""
    if _is_vector(inputs) or not is_supported(inputs):
        return chunked.key_value_grad(inputs, segments, do, dends)
    call, heads = _pass(inputs, segments), inputs.heads
    dk, dv, dstates = Grad(inputs.k, heads), Grad(inputs.v, heads), call.empty_states(segments)
    call.rows(q=inputs.queries, k=inputs.k, v=inputs.v, dout=do, dk=dk.parts, dv=dv.parts)
    call.point(dends=dends)
    call.fill(dstates=dstates)
    call.run("key_value_grad")
    return dk.value(), dv.value(), dstates


def apply_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor, dends: Tensor, gate_grads: bool
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.apply_grad(inputs, segments, do, states, dends, gate_grads)
    gate_grads = gate_grads and bool(inputs.gates)
    if not gate_grads and not _is_vector(inputs):
        no_gate_grads: GateGrads = (None,) * len(inputs.gates)
        of_keys, of_values, dstates = key_value_grad(inputs, segments, do, dends)
        return query_grad(inputs, segments, do, states), of_keys, of_values, no_gate_grads, dstates
    call, heads = _pass(inputs, segments), inputs.heads
    dq = Grad(inputs.queries, inputs.output_heads)
    dk, dv, dstates = Grad(inputs.k, heads), Grad(inputs.v, heads), call.empty_states(segments)
    call.rows(q=inputs.queries, k=inputs.k, v=inputs.v, dout=do, dq=dq.parts, dk=dk.parts, dv=dv.parts)
    call.point(states=states, dends=dends)
    call.fill(dstates=dstates)
    (gate,) = inputs.gates
    if not gate_grads:
        call.run("apply_grad")
        return dq.value(), dk.value(), dv.value(), (None,), dstates
    if gate.dim() == 1:
        sums = torch.zeros((len(segments), inputs.k.shape[0], heads), dtype=torch.float64, device="cpu")
        call.fill(dgate_sum=sums)
        call.run("apply_grad")
        dgate = sums.sum(dim=(0, 1)).unflatten(-1, (len(gate), -1)).sum(dim=-1).to(gate.dtype)
        return dq.value(), dk.value(), dv.value(), (dgate,), dstates
    parts = Grad(gate, heads, torch.float32)
    parts.parts.zero_()  # of tokens in no segment, as the torch operators give it
    call.rows(dgate=parts.parts)
    call.run("apply_grad")
    return dq.value(), dk.value(), dv.value(), (parts.value(),), dstates

"""Delta rule on CPUs, in C++ (`longctx/kernels/native/delta.cpp`).

Implements the passes of `longctx.kernels.linear.delta.chunked`, which has the equations and runs what this cannot:
float64, and machines without a compiler. Products of bfloat16 inputs are in bfloat16 where the CPU can.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.delta import chunked
from longctx.kernels.linear.native_call import DTYPES, Grad, Pass, fields
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.native import library

FAMILY = "delta"


class _Call(ctypes.Structure):
    """`Call` of delta.cpp."""

    _fields_ = fields(
        ("q", "k", "v", "dout", "out", "dq", "dk", "dv", "beta", "gate", "dbeta", "dgate"),
        ("by_channel",),
        ("states", "ends", "dends", "dstates", "transitions"),
    )


def is_supported(inputs: Inputs) -> bool:
    """Return whether the native kernels take these inputs."""
    return inputs.k.device.type == "cpu" and inputs.k.dtype in DTYPES and library.is_available(FAMILY)


def _pass(inputs: Inputs, segments: Sequence[Segment]) -> Pass:
    call = Pass(FAMILY, _Call, inputs, segments)
    call.rows(k=inputs.k, **dict(zip(("beta", "gate"), inputs.gates, strict=False)))
    call.set(by_channel=int(inputs.gates[-1].dim() == 4))
    return call


def _empty_transitions(inputs: Inputs, segments: Sequence[Segment]) -> Tensor:
    batch, heads, key_dim, _ = inputs.state_shape
    return torch.empty((len(segments), batch, heads, key_dim, key_dim), dtype=torch.float32, device="cpu")


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """Return the whole length, one segment, as `chunked` does."""
    return chunked.segment_length(heads, length, device)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1; see `chunked`."""
    if not is_supported(inputs):
        return chunked.summarize(inputs, segments)
    call, carry = _pass(inputs, segments), _empty_transitions(inputs, segments)
    states = call.empty_states(segments)
    call.rows(v=inputs.v)
    call.fill(ends=states, transitions=carry)
    call.run("summarize")
    return Carry(carry, states)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2; see `chunked`."""
    if not is_supported(inputs):
        return chunked.apply(inputs, segments, states)
    call, q, v = _pass(inputs, segments), inputs.queries, inputs.v
    out, ends = v.new_empty((*q.shape[:2], inputs.output_heads, v.shape[3])), call.empty_states(segments)
    call.rows(q=q, v=v, out=out)
    call.point(states=states)
    call.fill(ends=ends)
    call.run("apply")
    return out, ends


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.summarize_grad(inputs, segments, do)
    call, carry = _pass(inputs, segments), _empty_transitions(inputs, segments)
    dstates = call.empty_states(segments)
    call.rows(q=inputs.queries, dout=do)
    call.fill(dstates=dstates, transitions=carry)
    call.run("summarize_grad")
    return Carry(carry, dstates)


def apply_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor, dends: Tensor, gate_grads: bool
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.apply_grad(inputs, segments, do, states, dends, gate_grads)
    call, heads = _pass(inputs, segments), inputs.heads
    dstates = call.empty_states(segments)
    dq = Grad(inputs.queries, inputs.output_heads)
    dk, dv = Grad(inputs.k, heads), Grad(inputs.v, heads)
    dgates = [Grad(gate, heads, torch.float32) for gate in inputs.gates] if gate_grads else []
    for grad in dgates:
        grad.parts.zero_()  # of tokens in no segment, as the torch operators give it
    call.rows(q=inputs.queries, v=inputs.v, dout=do, dq=dq.parts, dk=dk.parts, dv=dv.parts)
    call.rows(**dict(zip(("dbeta", "dgate"), (grad.parts for grad in dgates), strict=False)))
    call.point(states=states, dends=dends)
    call.fill(dstates=dstates)
    call.run("apply_grad")
    of_gates: GateGrads = tuple(grad.value() for grad in dgates) or (None,) * len(inputs.gates)
    return dq.value(), dk.value(), dv.value(), of_gates, dstates

"""Additive recurrence on CPUs, in C++ (`longctx/kernels/native/additive.cpp`): scalar decays, constant ones, or none.

Implements the passes of `longctx.kernels.linear.additive.chunked`, which has the equations and runs what this cannot:
vector decays, float64, and machines without a compiler. Products of bfloat16 inputs are in bfloat16 where the CPU can.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.additive import chunked
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment
from longctx.kernels.native import library

FAMILY = "additive"
_DTYPES = (torch.float32, torch.bfloat16)


class _Tensor(ctypes.Structure):
    """`Tensor` of additive.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("brain", "batch", "token", "head", "heads")),
    )


_TENSORS = ("q", "k", "v", "dout", "out", "dq", "dk", "dv")


class _Call(ctypes.Structure):
    """`Call` of additive.cpp."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "length", "heads", "key_dim", "value_dim", "threads")),
        *((name, _Tensor) for name in _TENSORS),
        ("gate", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("gate_batch", "gate_token", "gate_head", "gate_heads")),
        ("dgate", ctypes.c_void_p),
        ("dgate_sum", ctypes.c_void_p),
        ("segment_count", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("segments", "starts", "states", "ends", "dends", "dstates")),
    )


def is_supported(inputs: Inputs) -> bool:
    """Return whether the native kernels take these inputs."""
    gates = inputs.gates
    return (
        inputs.k.device.type == "cpu"
        and inputs.k.dtype in _DTYPES
        and not (gates and gates[0].dim() == 4)
        and library.is_available(FAMILY)
    )


class _Pass:
    """A call of a native pass: its arguments, and the tensors that they point to."""

    def __init__(self, inputs: Inputs, segments: Sequence[Segment]) -> None:
        self._inputs = inputs
        self._kept: list[Tensor] = []
        batch, heads, key_dim, value_dim = inputs.state_shape
        self._call = _Call(batch, inputs.k.shape[1], heads, key_dim, value_dim, torch.get_num_threads())
        self._call.q.heads = heads
        self._set_gate()
        bounds: list[int] = []
        starts: list[int] = []
        for s in segments:
            bounds += [s.begin, s.end, len(s.starts), len(starts)]
            starts += [s.begin + start for start in s.starts]
        self._call.segment_count = len(segments)
        self.point(segments=torch.tensor(bounds, dtype=torch.int64), starts=torch.tensor(starts, dtype=torch.int64))

    def _set_gate(self) -> None:
        if not self._inputs.gates:
            return
        gate = self._inputs.gates[0].float()
        if gate.dim() == 1:
            gate = gate.expand(1, 1, -1)
        batch, token, head = gate.stride()
        constant = self._inputs.gates[0].dim() == 1
        self._call.gate_batch, self._call.gate_token = (0, 0) if constant else (batch, token)
        self._call.gate_head, self._call.gate_heads = head, gate.shape[2]
        self.point(gate=gate)

    def point(self, **tensors: Tensor) -> None:
        """Set pointers to contiguous tensors, or to the gate."""
        for name, x in tensors.items():
            self._kept.append(x)
            setattr(self._call, name, x.data_ptr())

    def rows(self, **tensors: Tensor) -> None:
        """Set tensors `[B, T, heads, D]`."""
        for name, x in tensors.items():
            x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
            self._kept.append(x)
            brain = int(x.dtype == torch.bfloat16)
            setattr(self._call, name, _Tensor(x.data_ptr(), brain, *x.stride()[:3], x.shape[2]))

    def run(self, function: str) -> None:
        """Call the pass."""
        library.call(FAMILY, function, self._call)

    def empty_states(self, segments: Sequence[Segment]) -> Tensor:
        """Allocate a state per segment, `[N, B, H, K, V]` float32."""
        return torch.empty((len(segments), *self._inputs.state_shape))


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """Return the whole length, one segment, as `chunked` does."""
    return chunked.segment_length(heads, length, device)


def summarize(inputs: Inputs, segments: Sequence[Segment]) -> Carry:
    """Pass 1; see `chunked`."""
    if not is_supported(inputs):
        return chunked.summarize(inputs, segments)
    call = _Pass(inputs, segments)
    states = call.empty_states(segments)
    call.rows(k=inputs.k, v=inputs.v)
    call.point(ends=states)
    call.run("summarize")
    return Carry(chunked.transitions(inputs, segments), states)


def apply(inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
    """Pass 2; see `chunked`."""
    if not is_supported(inputs):
        return chunked.apply(inputs, segments, states)
    call, q, v = _Pass(inputs, segments), inputs.queries, inputs.v
    out, ends = v.new_empty((*q.shape[:2], inputs.output_heads, v.shape[3])), call.empty_states(segments)
    call.rows(q=q, k=inputs.k, v=v, out=out)
    call.point(states=states.contiguous(), ends=ends)
    call.run("apply")
    return out, ends


def summarize_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
    """Pass 1 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.summarize_grad(inputs, segments, do)
    call = _Pass(inputs, segments)
    dstates = call.empty_states(segments)
    call.rows(q=inputs.queries, dout=do)
    call.point(dstates=dstates)
    call.run("summarize_grad")
    return Carry(chunked.transitions(inputs, segments), dstates)


def query_grad(inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor:
    """Only dq of pass 2 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.query_grad(inputs, segments, do, states)
    call, dq = _Pass(inputs, segments), _Grad(inputs.queries, inputs.output_heads)
    call.rows(q=inputs.queries, k=inputs.k, v=inputs.v, dout=do, dq=dq.parts)
    call.point(states=states.contiguous())
    call.run("query_grad")
    return dq.value()


def key_value_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The rest of pass 2 backward, where no gate needs a gradient; see `chunked`."""
    if not is_supported(inputs):
        return chunked.key_value_grad(inputs, segments, do, dends)
    call, heads = _Pass(inputs, segments), inputs.heads
    dk, dv, dstates = _Grad(inputs.k, heads), _Grad(inputs.v, heads), call.empty_states(segments)
    call.rows(q=inputs.queries, k=inputs.k, v=inputs.v, dout=do, dk=dk.parts, dv=dv.parts)
    call.point(dends=dends.contiguous(), dstates=dstates)
    call.run("key_value_grad")
    return dk.value(), dv.value(), dstates


def apply_grad(
    inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor, dends: Tensor, gate_grads: bool
) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
    """Pass 2 backward; see `chunked`."""
    if not is_supported(inputs):
        return chunked.apply_grad(inputs, segments, do, states, dends, gate_grads)
    if not (inputs.gates and gate_grads):
        no_gate_grads: GateGrads = (None,) * len(inputs.gates)
        of_keys, of_values, dstates = key_value_grad(inputs, segments, do, dends)
        return query_grad(inputs, segments, do, states), of_keys, of_values, no_gate_grads, dstates
    call, heads = _Pass(inputs, segments), inputs.heads
    dq = _Grad(inputs.queries, inputs.output_heads)
    dk, dv, dstates = _Grad(inputs.k, heads), _Grad(inputs.v, heads), call.empty_states(segments)
    call.rows(q=inputs.queries, k=inputs.k, v=inputs.v, dout=do, dq=dq.parts, dk=dk.parts, dv=dv.parts)
    call.point(states=states.contiguous(), dends=dends.contiguous(), dstates=dstates)
    gate = inputs.gates[0]
    if gate.dim() == 1:
        dgate = torch.zeros((len(segments), inputs.k.shape[0], heads), dtype=torch.float64)
        call.point(dgate_sum=dgate)
    else:
        dgate = torch.zeros((*inputs.k.shape[:2], heads))
        call.point(dgate=dgate)
    call.run("apply_grad")
    summed = dgate.sum(dim=(0, 1)) if gate.dim() == 1 else dgate
    dgate = summed.unflatten(-1, (gate.shape[-1], -1)).sum(dim=-1).to(gate.dtype)
    return dq.value(), dk.value(), dv.value(), (dgate,), dstates


class _Grad:
    """The gradient of x `[B, T, heads, D]`, computed in parts, one per state that reads a head."""

    def __init__(self, x: Tensor, heads: int) -> None:
        self._x, self._shared = x, heads // x.shape[2]
        self.parts = torch.empty_like(x, memory_format=torch.contiguous_format)
        if self._shared > 1:
            self.parts = torch.empty((*x.shape[:2], heads, x.shape[3]))

    def value(self) -> Tensor:
        """Return the gradient, in the dtype of x."""
        if self._shared == 1:
            return self.parts
        return self.parts.unflatten(2, (self._x.shape[2], self._shared)).sum(dim=3).to(self._x.dtype)

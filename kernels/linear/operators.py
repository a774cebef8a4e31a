"""torch.library operators of a linear recurrence, `torch.ops.longctx.<name>_<function>`.

torch.compile does not trace into an operator, FlopCounterMode counts it, and the device picks its implementation: torch
operators everywhere, Triton on CUDA where it is installed and the dtype is not float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longctx.kernels.device import import_triton
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.finite import is_checked
from longctx.kernels.linear.checks import check_heads, check_operands
from longctx.kernels.linear.nonfinite import ARGUMENTS, contained
from longctx.kernels.linear.recurrence import Carry, GateGrads, Inputs, Segment

_INPUTS = "Tensor? q, Tensor k, Tensor v, Tensor[] gates, int[] segments"
_PREPARE = f"({_INPUTS}) -> Tensor[]"
_SIGNATURES = {
    "summarize": f"({_INPUTS}) -> (Tensor, Tensor)",
    "apply": f"({_INPUTS}, Tensor states) -> (Tensor, Tensor)",
    "summarize_grad": f"({_INPUTS}, Tensor do) -> (Tensor, Tensor)",
    "apply_grad": f"({_INPUTS}, Tensor do, Tensor states, Tensor dends, bool gate_grads)"
    " -> (Tensor, Tensor, Tensor, Tensor[], Tensor)",
    "query_grad": f"({_INPUTS}, Tensor do, Tensor states) -> Tensor",
    "key_value_grad": f"({_INPUTS}, Tensor do, Tensor dends) -> (Tensor, Tensor, Tensor)",
}
Shape = Sequence[int]


def _encode(segments: Sequence[Segment]) -> list[int]:
    """Encode segments as integers, which an operator can take."""
    return [n for s in segments for n in (s.begin, s.end, len(s.starts), *s.starts)]


def _decode(numbers: Sequence[int]) -> list[Segment]:
    segments, at = [], 0
    while at < len(numbers):
        begin, end, count = numbers[at : at + 3]
        segments.append(Segment(begin, end, tuple(numbers[at + 3 : at + 3 + count])))
        at += 3 + count
    return segments


@lru_cache(maxsize=64)
def _decode_once(numbers: tuple[int, ...]) -> tuple[Segment, ...]:
    """Decode segments that all layers and passes of a step share: hundreds, with thousands of documents."""
    return tuple(_decode(numbers))


class RegisteredRecurrence(ABC):
    """A `LinearRecurrence` whose functions are operators. A subclass owns its gates, its FLOPs and its decoding step.

    Implementations are modules with the functions of `LinearRecurrence`; `query_grad` and `key_value_grad` are
    optional, and so is `prepare(inputs, segments)`, which returns the tensors of `Inputs.prepared`. A module that has
    it also has `allocate_prepared(inputs, segments)`, the same tensors without their contents.
    """

    name: ClassVar[str]
    gate_names: ClassVar[tuple[str, ...]]
    """Names of the gates, in order; a call may omit the last ones, down to `required_gates`."""
    required_gates: ClassVar[int] = 0
    """Number of gates, the first ones, that a call may not omit."""
    prepares: ClassVar[bool] = False
    """Whether an implementation has `prepare`; the operators then take `prepared`, a list of tensors by keyword."""

    def __init__(self, implementation: ModuleType, triton: str) -> None:
        """Register the operators. `triton` is the name of the Triton implementation's module, imported on first use."""
        self._torch, self._triton_module = implementation, triton
        self._ops: dict[str, Callable[..., Any]] = {}
        signatures = {name: text for name, text in _SIGNATURES.items() if hasattr(implementation, name)}
        if self.prepares:
            signatures = {
                name: text.replace(") ->", ", *, Tensor[]? prepared=None) ->") for name, text in signatures.items()
            }
            signatures["prepare"] = _PREPARE
        for function, signature in signatures.items():
            op = f"longctx::{self.name}_{function}"
            torch.library.define(op, signature)
            torch.library.impl(op, "CompositeExplicitAutograd")(self._implementation(function))
            torch.library.register_fake(op)(getattr(self, f"_fake_{function}"))
            packet = getattr(torch.ops.longctx, f"{self.name}_{function}")
            register_flop_formula(packet)(getattr(self, f"_{function}_flops"))
            self._ops[function] = packet.default

    def _implementation(self, function: str) -> Callable[..., Any]:
        """Return the body of an operator, which picks the module by the device and dtype of k."""

        def run(
            q: Tensor | None,
            k: Tensor,
            v: Tensor,
            gates: list[Tensor],
            segments: list[int],
            *rest: Any,
            prepared: Sequence[Tensor] | None = None,
        ) -> Any:
            inputs = Inputs(q, k, v, tuple(gates), tuple(prepared or ()))
            run, decoded = getattr(self._module(k), function), _decode_once(tuple(segments))
            if is_checked(k) and function in ARGUMENTS:
                keyed = self.transition_dims(inputs) == (k.shape[3],) * 2
                result = contained(function, run, inputs, decoded, *rest, gate_names=self.gate_names, keyed=keyed)
            else:
                result = run(inputs, decoded, *rest)
            if isinstance(result, Carry):
                return result.transition, result.state
            if function == "apply_grad":
                dq, dk, dv, dgates, dstates = result
                return dq, dk, dv, [x for x in dgates if x is not None], dstates
            return result

        return run

    def _module(self, k: Tensor) -> ModuleType:
        """Return the implementation for the device and dtype of k."""
        triton = import_triton(self._triton_module) if k.is_cuda and k.dtype != torch.float64 else None
        return triton or self._torch

    def _call(self, function: str, inputs: Inputs, segments: Sequence[Segment], *rest: Any) -> Any:
        prepared = {"prepared": list(inputs.prepared)} if inputs.prepared else {}
        op = self._ops[function]
        return op(inputs.q, inputs.k, inputs.v, list(inputs.gates), _encode(segments), *rest, **prepared)

    def named_gates(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return the gates by name. Raises ValueError where there are too many or too few."""
        gates, names = inputs.gates, self.gate_names
        if not self.required_gates <= len(gates) <= len(names):
            raise ValueError(f"the {self.name} recurrence has {len(gates)} gates: expected {' and '.join(names)}")
        return dict(zip(names, gates, strict=False))

    def check(self, inputs: Inputs) -> None:
        """See `LinearRecurrence`."""
        k, v = inputs.k, inputs.v
        q = k if inputs.q is None else inputs.q
        check_operands(q, k, v)
        named = self.named_gates(inputs)
        self.check_gates(named, k)
        check_heads(q, k, v, named)

    @abstractmethod
    def check_gates(self, gates: dict[str, Tensor], k: Tensor) -> None:
        """Raise ValueError where a gate's shape, dtype, device or value does not fit k `[B, T, Hk, K]`."""

    @abstractmethod
    def transition_dims(self, inputs: Inputs) -> tuple[int, ...]:
        """Return the dims of a segment's transition after `N, B, H`: `()`, `(K,)` or `(K, K)`."""

    def segment_length(self, heads: int, length: int, device: torch.device) -> int:
        """See `LinearRecurrence`."""
        triton = import_triton(self._triton_module) if device.type == "cuda" else None
        return (triton or self._torch).segment_length(heads, length, device)

    def prepare(self, inputs: Inputs, segments: Sequence[Segment]) -> Inputs:
        """See `LinearRecurrence`."""
        if not self.prepares or not hasattr(self._module(inputs.k), "prepare"):
            return inputs
        op = self._ops["prepare"]
        prepared = op(None, inputs.k, inputs.v, list(inputs.gates), _encode(segments))
        return replace(inputs, prepared=tuple(prepared))

    def summarize(self, inputs: Inputs, segments: Sequence[Segment]) -> Carry:
        """See `LinearRecurrence`."""
        return Carry(*self._call("summarize", inputs, segments))

    def apply(self, inputs: Inputs, segments: Sequence[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearRecurrence`."""
        return self._call("apply", inputs, segments, states)

    def summarize_grad(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor) -> Carry:
        """See `LinearRecurrence`."""
        return Carry(*self._call("summarize_grad", inputs, segments, do))

    def apply_grad(
        self,
        inputs: Inputs,
        segments: Sequence[Segment],
        do: Tensor,
        states: Tensor,
        dends: Tensor,
        gate_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, GateGrads, Tensor]:
        """See `LinearRecurrence`."""
        dq, dk, dv, dgates, dstates = self._call("apply_grad", inputs, segments, do, states, dends, gate_grads)
        return dq, dk, dv, tuple(dgates) or (None,) * len(inputs.gates), dstates

    def query_grad(self, inputs: Inputs, segments: Sequence[Segment], do: Tensor, states: Tensor) -> Tensor | None:
        """See `LinearRecurrence`."""
        return self._call("query_grad", inputs, segments, do, states) if "query_grad" in self._ops else None

    def key_value_grad(
        self, inputs: Inputs, segments: Sequence[Segment], do: Tensor, dends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LinearRecurrence`."""
        return self._call("key_value_grad", inputs, segments, do, dends)

    def step(self, inputs: Inputs, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `LinearRecurrence`."""
        heads = state.shape[1]

        def grouped(x: Tensor) -> Tensor:
            """Return the token's `[B, heads, ...]` in the state's dtype, one head per state."""
            return x.to(state.dtype).repeat_interleave(heads // x.shape[1], dim=1)

        gates = {
            name: grouped(gate[None] if gate.dim() == 1 else gate[:, 0])
            for name, gate in self.named_gates(inputs).items()
        }
        state = self.update_state(state, grouped(inputs.k[:, 0]), grouped(inputs.v[:, 0]), **gates)
        q = inputs.queries[:, 0]
        queries = grouped(q) if q.shape[1] < heads else q.to(state.dtype)
        out = torch.einsum("bhrk,bhkv->bhrv", queries.unflatten(1, (heads, -1)), state).flatten(1, 2)
        return out.to(inputs.v.dtype)[:, None], state

    @abstractmethod
    def update_state(self, state: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> Tensor:
        """Return `S_t` from `S_{t-1}` `[B, H, K, V]`, k `[B, H, K]`, v `[B, H, V]` and the gates `[B, H, ...]`."""

    # Fake implementations: shapes and dtypes of the results, for torch.compile.

    def _fake_prepare(
        self, q: Tensor | None, k: Tensor, v: Tensor, gates: list[Tensor], segments: list[int]
    ) -> list[Tensor]:
        prepared = self._module(k).allocate_prepared(Inputs(q, k, v, tuple(gates)), _decode(segments))
        return list(prepared)

    def _fake_summarize(
        self, q: Tensor | None, k: Tensor, v: Tensor, gates: list[Tensor], segments: list[int], *rest: Any, **_: Any
    ) -> tuple[Tensor, Tensor]:
        inputs, dtype = Inputs(q, k, v, tuple(gates)), accumulation_dtype(k.dtype)
        state = (len(_decode(segments)), *inputs.state_shape)
        return k.new_empty((*state[:3], *self.transition_dims(inputs)), dtype=dtype), k.new_empty(state, dtype=dtype)

    _fake_summarize_grad = _fake_summarize

    def _fake_apply(
        self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], segments: list[int], states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return v.new_empty((*q.shape[:2], max(q.shape[2], states.shape[2]), v.shape[3])), torch.empty_like(states)

    def _fake_apply_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], segments: list[int], *rest: Any, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        _, states, _, gate_grads = rest
        dq, dk, dv, *dgates = (x.new_empty(x.shape) for x in (q, k, v, *(gates if gate_grads else ())))
        return dq, dk, dv, dgates, torch.empty_like(states)

    def _fake_query_grad(self, q: Tensor, *rest: Any) -> Tensor:
        return q.new_empty(q.shape)

    def _fake_key_value_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], segments: list[int], do: Tensor, dends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(dends)

    # FLOPs are those of the recurrence, token by token: the chunkwise form does more, and recomputation is not counted.
    # FlopCounterMode passes shapes in place of tensors. A query reads a state with 2 K V FLOPs; the cost of a write
    # depends on the recurrence.

    state_writes: ClassVar[int]
    """Products over a state, of 2 K V FLOPs each, per token that writes."""

    @staticmethod
    def _prepare_flops(*args: Any, **kwargs: Any) -> int:
        """Return 0: the recurrence, token by token, prepares nothing."""
        return 0

    @abstractmethod
    def _summarize_flops(self, q: Any, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int: ...

    @abstractmethod
    def _summarize_grad_flops(self, q: Shape, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int: ...

    @staticmethod
    def _read_flops(q: Shape, k: Shape, states: Shape) -> int:
        """Return the FLOPs of all queries, which read states of shape `[N, B, H, K, V]`."""
        _, batch, heads, key_dim, value_dim = states
        return 2 * batch * k[1] * key_dim * value_dim * max(heads, q[2])

    @staticmethod
    def _state_flops(k: Shape, states: Shape) -> int:
        """Return the FLOPs of one product over a state per token and state head."""
        _, batch, heads, key_dim, value_dim = states
        return 2 * batch * k[1] * heads * key_dim * value_dim

    def _apply_flops(self, q: Shape, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return self._read_flops(q, k, out_shape[1]) + self.state_writes * self._state_flops(k, out_shape[1])

    def _apply_grad_flops(self, q: Shape, k: Shape, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        return 2 * (self._read_flops(q, k, out_shape[4]) + self.state_writes * self._state_flops(k, out_shape[4]))

    def _query_grad_flops(self, q: Shape, k: Shape, v: Shape, gates: Any, segments: Any, *rest: Any, **_: Any) -> int:
        return self._read_flops(q, k, rest[1])  # a query's gradient reads a state

    def _key_value_grad_flops(
        self, q: Shape, k: Shape, v: Shape, gates: Any, segments: Any, *rest: Any, **_: Any
    ) -> int:
        # The gradients of a key and of a value each read the gradient of a state, which a query writes.
        return self._read_flops(q, k, rest[1]) + 2 * self._state_flops(k, rest[1])

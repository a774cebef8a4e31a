"""The linear recurrences as operators of torch.library, `torch.ops.longctx.*`.

Registered, torch.compile takes them whole, FlopCounterMode counts them, and the device picks the implementation: torch
operators everywhere, Triton for CUDA where it is installed and the dtype is not float64. Segments pass as integers.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.additive import chunked as additive
from longctx.kernels.linear.checks import check_beta, check_decay, check_heads, check_operands
from longctx.kernels.linear.delta import chunked as delta
from longctx.kernels.linear.recurrence import Carry, Gates, Segment, state_heads

_SIGNATURES = {
    "summarize": "(Tensor k, Tensor v, Tensor[] gates, int[] segments) -> (Tensor, Tensor)",
    "apply": "(Tensor q, Tensor k, Tensor v, Tensor[] gates, int[] segments, Tensor states) -> (Tensor, Tensor)",
    "summarize_grad": "(Tensor q, Tensor k, Tensor v, Tensor[] gates, int[] segments, Tensor do) -> (Tensor, Tensor)",
    "apply_grad": "(Tensor q, Tensor k, Tensor v, Tensor[] gates, int[] segments, Tensor do, Tensor states, "
    "Tensor dends, bool gate_grads) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)",
    "query_grad": "(Tensor q, Tensor k, Tensor v, Tensor[] gates, int[] segments, Tensor do, Tensor states) -> Tensor",
    "key_value_grad": "(Tensor q, Tensor k, Tensor v, Tensor[] gates, int[] segments, Tensor do, Tensor dends)"
    " -> (Tensor, Tensor, Tensor)",
}


def _encode(segments: Sequence[Segment]) -> list[int]:
    return [n for s in segments for n in (s.begin, s.end, len(s.starts), *s.starts)]


def _decode(numbers: Sequence[int]) -> list[Segment]:
    segments, at = [], 0
    while at < len(numbers):
        begin, end, count = numbers[at : at + 3]
        segments.append(Segment(begin, end, tuple(numbers[at + 3 : at + 3 + count])))
        at += 3 + count
    return segments


@cache
def _triton(module: str | None) -> ModuleType | None:
    """The Triton implementation, None where there is none or Triton is not installed."""
    if module is None or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(module)


class Registered:
    """A recurrence whose functions are operators `longctx::<name>_<function>`. See `LinearRecurrence`."""

    def __init__(self, name: str, implementation: ModuleType, triton: str | None) -> None:
        self.name = name
        self._torch, self._triton_module = implementation, triton
        self._ops: dict[str, Callable[..., Any]] = {}
        for function, signature in _SIGNATURES.items():
            if not hasattr(implementation, function):
                continue
            op = f"longctx::{name}_{function}"
            torch.library.define(op, signature)
            torch.library.impl(op, "CompositeExplicitAutograd")(getattr(self, f"_{function}"))
            torch.library.register_fake(op)(getattr(self, f"_fake_{function}"))
            packet = getattr(torch.ops.longctx, f"{name}_{function}")
            register_flop_formula(packet)(getattr(self, f"_{function}_flops"))
            self._ops[function] = packet.default

    def _on(self, x: Tensor) -> Any:
        """The implementation for the device and dtype of a tensor."""
        triton = _triton(self._triton_module) if x.is_cuda and x.dtype != torch.float64 else None
        return triton or self._torch

    def check(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> None:
        """Raise ValueError, naming the argument, where the tensors do not fit the recurrence."""
        check_operands(q, k, v)
        names = ["beta", "log_decay"] if self.name == "delta" else ["log_decay"]
        if len(gates) > len(names) or (self.name == "delta" and not gates):
            raise ValueError(f"the {self.name} recurrence has {len(gates)} gates: expected {' and '.join(names)}")
        named = dict(zip(names, gates, strict=False))
        if "beta" in named:
            check_beta(named["beta"], k)
        if "log_decay" in named:
            check_decay(named["log_decay"], k, constant=self.name == "additive")
        check_heads(q, k, v, named)

    def segment_length(self, heads: int, length: int, device: torch.device) -> int:
        """See `LinearRecurrence`."""
        triton = _triton(self._triton_module) if device.type == "cuda" else None
        return (triton or self._torch).segment_length(heads, length, device)

    def summarize(self, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment]) -> Carry:
        """See `LinearRecurrence`."""
        return Carry(*self._ops["summarize"](k, v, list(gates), _encode(segments)))

    def apply(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LinearRecurrence`."""
        return self._ops["apply"](q, k, v, list(gates), _encode(segments), states)

    def summarize_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor
    ) -> Carry:
        """See `LinearRecurrence`."""
        return Carry(*self._ops["summarize_grad"](q, k, v, list(gates), _encode(segments), do))

    def apply_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        segments: Sequence[Segment],
        do: Tensor,
        states: Tensor,
        dends: Tensor,
        gate_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], Tensor]:
        """See `LinearRecurrence`."""
        dq, dk, dv, dgates, dstates = self._ops["apply_grad"](
            q, k, v, list(gates), _encode(segments), do, states, dends, gate_grads
        )
        return dq, dk, dv, tuple(dgates) or (None,) * len(gates), dstates

    def query_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, states: Tensor
    ) -> Tensor | None:
        """See `LinearRecurrence`."""
        if "query_grad" not in self._ops:
            return None
        return self._ops["query_grad"](q, k, v, list(gates), _encode(segments), do, states)

    def key_value_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, segments: Sequence[Segment], do: Tensor, dends: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LinearRecurrence`."""
        return self._ops["key_value_grad"](q, k, v, list(gates), _encode(segments), do, dends)

    def _summarize(
        self, k: Tensor, v: Tensor, gates: Sequence[Tensor], segments: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        carry = self._on(k).summarize(k, v, tuple(gates), _decode(segments))
        return carry.transition, carry.state

    def _apply(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], segments: Sequence[int], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._on(q).apply(q, k, v, tuple(gates), _decode(segments), states)

    def _summarize_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], segments: Sequence[int], do: Tensor
    ) -> tuple[Tensor, Tensor]:
        carry = self._on(q).summarize_grad(q, k, v, tuple(gates), _decode(segments), do)
        return carry.transition, carry.state

    def _apply_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        segments: Sequence[int],
        do: Tensor,
        states: Tensor,
        dends: Tensor,
        gate_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        dq, dk, dv, dgates, dstates = self._on(q).apply_grad(
            q, k, v, tuple(gates), _decode(segments), do, states, dends, gate_grads
        )
        return dq, dk, dv, [x for x in dgates if x is not None], dstates

    def _query_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        segments: Sequence[int],
        do: Tensor,
        states: Tensor,
    ) -> Tensor:
        return self._on(q).query_grad(q, k, v, tuple(gates), _decode(segments), do, states)

    def _key_value_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        segments: Sequence[int],
        do: Tensor,
        dends: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._on(q).key_value_grad(q, k, v, tuple(gates), _decode(segments), do, dends)

    def _fake_summarize(
        self, k: Tensor, v: Tensor, gates: Sequence[Tensor], segments: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        heads, dtype = state_heads(k, v, gates), accumulation_dtype(k.dtype)
        lead = (len(_decode(segments)), k.shape[0], heads)
        inner: tuple[int, ...] = ()
        if self.name == "delta":
            inner = (k.shape[3], k.shape[3])
        elif gates and gates[0].dim() == 4:
            inner = (k.shape[3],)
        return k.new_empty((*lead, *inner), dtype=dtype), k.new_empty((*lead, k.shape[3], v.shape[3]), dtype=dtype)

    def _fake_apply(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], segments: Sequence[int], states: Tensor
    ) -> tuple[Tensor, Tensor]:
        return v.new_empty((*q.shape[:2], max(q.shape[2], states.shape[2]), v.shape[3])), torch.empty_like(states)

    def _fake_summarize_grad(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Sequence[Tensor], segments: Sequence[int], do: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._fake_summarize(k, v, gates, segments)

    def _fake_apply_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        segments: Sequence[int],
        do: Tensor,
        states: Tensor,
        dends: Tensor,
        gate_grads: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
        dq, dk, dv, *dgates = (x.new_empty(x.shape) for x in (q, k, v, *(gates if gate_grads else ())))
        return dq, dk, dv, dgates, torch.empty_like(states)

    def _fake_query_grad(self, q: Tensor, *args: Any) -> Tensor:
        return q.new_empty(q.shape)

    def _fake_key_value_grad(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Tensor],
        segments: Sequence[int],
        do: Tensor,
        dends: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(dends)

    # FLOPs are those of the recurrence itself, a token at a time: chunks do more, and recomputing is not counted. A
    # token writes into a state 2 K V (with the delta rule twice that: it first asks), and each query reads 2 K V.

    @property
    def _writes(self) -> int:
        return 2 if self.name == "delta" else 1

    def _summarize_flops(self, k: Any, v: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        _, (_, batch, heads, key_dim, value_dim) = out_shape
        channels = value_dim + (key_dim if self.name == "delta" else 0)
        return 2 * batch * k[1] * heads * key_dim * channels * self._writes

    def _apply_flops(self, q: Any, k: Any, v: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        _, (_, batch, heads, key_dim, value_dim) = out_shape
        return 2 * batch * k[1] * key_dim * value_dim * (self._writes * heads + max(heads, q[2]))

    def _summarize_grad_flops(self, q: Any, k: Any, v: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        _, (_, batch, heads, key_dim, value_dim) = out_shape
        reads = 2 * batch * k[1] * key_dim * value_dim * max(heads, q[2])
        asks = 4 * batch * k[1] * heads * key_dim * (value_dim + key_dim) if self.name == "delta" else 0
        return reads + asks

    def _apply_grad_flops(self, q: Any, k: Any, v: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
        _, batch, heads, key_dim, value_dim = out_shape[4]
        return 4 * batch * k[1] * key_dim * value_dim * (self._writes * heads + max(heads, q[2]))

    # A gradient of a query reads a state, and those of a key and a value read that of a state, which a query writes.

    def _query_grad_flops(
        self, q: Any, k: Any, v: Any, gates: Any, segments: Any, do: Any, states: Any, **_: Any
    ) -> int:
        _, batch, heads, key_dim, value_dim = states
        return 2 * batch * k[1] * key_dim * value_dim * max(heads, q[2])

    def _key_value_grad_flops(
        self, q: Any, k: Any, v: Any, gates: Any, segments: Any, do: Any, dends: Any, **_: Any
    ) -> int:
        _, batch, heads, key_dim, value_dim = dends
        return 2 * batch * k[1] * key_dim * value_dim * (2 * heads + max(heads, q[2]))


ADDITIVE = Registered("additive", additive, "longctx.kernels.linear.additive.triton")
"""`longctx.kernels.linear.additive.chunked`: linear attention, lightning, retention, simple GLA, Mamba-2, GLA,
HGRN-2."""
DELTA = Registered("delta", delta, "longctx.kernels.linear.delta.triton")
"""`longctx.kernels.linear.delta.chunked`: DeltaNet, Gated DeltaNet, KDA."""

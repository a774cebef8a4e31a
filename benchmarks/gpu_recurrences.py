"""Linear recurrences of the GPU benchmark: inputs of chance, and their kernels, on a GPU or in Triton's interpreter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_shape import Shape
from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.api import Plan, scan_recurrence
from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.recurrence import LinearRecurrence, Segment

RECURRENCES = {
    "additive/constant": "lightning",
    "additive/scalar": "simple GLA",
    "additive/vector": "GLA",
    "delta/none": "DeltaNet",
    "delta/scalar": "Gated DeltaNet",
    "delta/vector": "KDA",
}
"""Mixers by the kind of their recurrence and of its decay."""
INTERPRETED_SEGMENT = 16
"""Tokens of a segment in the interpreter: a few segments in a short sequence."""
_PASSES = ("summarize", "apply", "summarize_grad", "apply_grad", "query_grad", "key_value_grad")


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call: q, k, v, the gates `(beta, log_decay)` as far as there are, and the output's gradient."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    do: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the results: o and the gradients."""
        gates = {"none": (), "constant": ("dlog_decay",)}.get(self.kind.split("/")[1], ("dlog_decay",))
        return ("o", "dq", "dk", "dv", *(("dbeta",) if self.kind.startswith("delta") else ()), *gates)

    def part(self, begin: int, heads: Sequence[int]) -> "Inputs":
        """Return the tokens from `begin` on of some heads, copied."""

        def pick(x: Tensor) -> Tensor:
            return (x[list(heads)] if x.dim() == 1 else x[:, begin:, list(heads)]).clone()

        gates = tuple(pick(x) for x in self.gates)
        return replace(self, q=pick(self.q), k=pick(self.k), v=pick(self.v), gates=gates, do=pick(self.do))

    def double(self) -> "Inputs":
        """Return the inputs in float64."""
        gates = tuple(x.double() for x in self.gates)
        return replace(self, q=self.q.double(), k=self.k.double(), v=self.v.double(), gates=gates, do=self.do.double())


def draw(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, *, strong: bool = False) -> Inputs:
    """Draw tokens in `dtype` and float32 gates; log decays of about -0.01 to -0.3, a tenth of them -1e4 if `strong`.

    Keys are unit vectors for the delta rule.
    """
    generator = torch.Generator(device).manual_seed(0)
    tokens = (1, shape.tokens, shape.heads)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    q, do, v = (normal(*tokens, shape.dim).to(dtype) for _ in range(3))
    k = normal(*tokens, shape.dim)
    recurrence, decay = kind.split("/")
    k = (F.normalize(k, dim=-1) if recurrence == "delta" else 0.1 * k).to(dtype)
    gates = [torch.rand(tokens, generator=generator, device=device)] if recurrence == "delta" else []
    if decay == "constant":
        gates.append(-(2.0 ** -torch.arange(2.0, 2 + shape.heads, device=device).clamp(max=10)))
    elif decay != "none":
        size = (*tokens, shape.dim) if decay == "vector" else tokens
        log_decay = F.logsigmoid(normal(*size) + 4)
        if strong:
            log_decay = log_decay.masked_fill(torch.rand(size, generator=generator, device=device) < 0.1, -1e4)
        gates.append(log_decay)
    return Inputs(kind, q, k, v, tuple(gates), do)


def triton_module(kind: str) -> ModuleType:
    """Return the Triton implementation of a kind's passes."""
    from longctx.kernels.linear.additive import triton as additive
    from longctx.kernels.linear.delta import triton as delta

    return additive if kind.startswith("additive") else delta


@cache
def _faster_interpreter() -> None:
    from tests.interpreter import patch_once_per_kernel

    patch_once_per_kernel()


class _Interpreted:
    """A recurrence whose passes are the Triton kernels on CPU tensors too, where Triton interprets them."""

    def __init__(self, recurrence: LinearRecurrence, triton: ModuleType) -> None:
        self._recurrence, self._triton = recurrence, triton
        _faster_interpreter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._triton if name in _PASSES and hasattr(self._triton, name) else self._recurrence, name)

    def segment_length(self, heads: int, length: int, device: torch.device) -> int:
        return INTERPRETED_SEGMENT


def attend(inputs: Inputs, starts: tuple[int, ...] = ()) -> Tensor:
    """Return o; `starts` are the first tokens of documents. float64 runs the torch operators, all else the kernels."""
    recurrence: Any = ADDITIVE if inputs.kind.startswith("additive") else DELTA
    if inputs.k.device.type == "cpu" and inputs.k.dtype != torch.float64:
        recurrence = _Interpreted(recurrence, triton_module(inputs.kind))
    plan = Plan((Segment(0, inputs.k.shape[1], starts),))
    return scan_recurrence(recurrence, inputs.q, inputs.k, inputs.v, inputs.gates, plan)[0]


def with_gradients(inputs: Inputs, starts: tuple[int, ...] = (), *, constant: bool = True) -> tuple[Tensor, ...]:
    """Return the results by `Inputs.names`; without `constant`, as in the models, constant decays have no gradient."""
    wanted = [gate.dim() > 1 or constant for gate in inputs.gates]
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    gates = [x.detach().requires_grad_(wants) for x, wants in zip(inputs.gates, wanted, strict=True)]
    q, k, v = leaves
    out = attend(replace(inputs, q=q, k=k, v=v, gates=tuple(gates)), starts)
    leaves += [x for x, wants in zip(gates, wanted, strict=True) if wants]
    return out.detach(), *torch.autograd.grad(out, leaves, inputs.do)

"""Benchmarked kernels: their inputs, which are also their peers', and their FLOPs.

Inputs are one sequence (batch 1) with `heads` heads and K = V = `head_dim`. The pointwise kernels act on rows of
`heads * head_dim` channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from longctx.bench import flops
from longctx.kernels.attention import block as attention
from longctx.kernels.attention.block import CAUSAL
from longctx.kernels.linear.additive import chunked as additive
from longctx.kernels.linear.api import linear_attention
from longctx.kernels.linear.delta import chunked as delta
from longctx.kernels.pointwise import rms_norm, swiglu

Inputs = dict[str, Tensor]

EPS = 1e-5
"""Of RMSNorm."""


@dataclass(frozen=True)
class Shape:
    """Sizes and dtype ("float32", "bfloat16") of a kernel's inputs."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


@dataclass(frozen=True)
class Workload:
    """A computation with its inputs: `run(leaves)` is timed, with gradients of all leaves except the `constants`."""

    leaves: Inputs
    run: Callable[[Inputs], Tensor]
    constants: frozenset[str] = frozenset()
    gradients: Callable[[Mapping[str, Tensor]], Inputs] = dict
    """Converts gradients of the leaves to gradients of the kernel's inputs, where a peer's leaves differ from those."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of this library: its random inputs, its call and the FLOPs of its forward pass."""

    name: str
    draw: Callable[[Shape, torch.Generator], Inputs]
    run: Callable[[Inputs], Tensor]
    flops: Callable[[Shape], int] | None
    """None for memory-bound kernels with a few operations per element."""
    constants: frozenset[str] = frozenset()
    recurrent: bool = True

    def workload(self, inputs: Inputs) -> Workload:
        """Return the kernel's workload on `inputs`."""
        return Workload(inputs, self.run, self.constants)


def _tokens(shape: Shape, generator: torch.Generator, *inner: int) -> Tensor:
    size = (1, shape.tokens, *inner)
    return torch.randn(size, generator=generator, device=generator.device, dtype=shape.torch_dtype)


def _qkv(shape: Shape, generator: torch.Generator) -> Inputs:
    return {name: _tokens(shape, generator, shape.heads, shape.head_dim) for name in ("q", "k", "v")}


def slopes(heads: int, device: torch.device) -> Tensor:
    """Compute the decay slopes of lightning attention, `2^(-8 (h + 1) / H)`, `[H]` float32 (negative log decays)."""
    return 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device, dtype=torch.float32))


def _recurrence_inputs(
    shape: Shape, generator: torch.Generator, *, decay: Literal["none", "constant", "head", "channel"], beta: bool
) -> Inputs:
    inputs = _qkv(shape, generator)
    if decay == "constant":
        inputs["log_decay"] = -slopes(shape.heads, generator.device)
    elif decay != "none":
        channels = (shape.head_dim,) if decay == "channel" else ()
        size = (1, shape.tokens, shape.heads, *channels)
        # Log decays are float32, and bounded away from 0 because a peer divides its inputs by them.
        decays = torch.rand(size, generator=generator, device=generator.device)
        inputs["log_decay"] = decays.mul_(-0.099).sub_(0.001)
    if beta:
        inputs["k"].div_(torch.linalg.vector_norm(inputs["k"], dim=-1, keepdim=True))
        size = (1, shape.tokens, shape.heads)
        inputs["beta"] = torch.rand(size, generator=generator, device=generator.device, dtype=shape.torch_dtype)
    return inputs


def _additive(inputs: Inputs) -> Tensor:
    return linear_attention(inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"])[0]


def delta_scale(q: Tensor) -> float:
    """Return the output scale of the delta rule, as its models use it."""
    return float(q.shape[-1] ** -0.5)


def _delta(inputs: Inputs) -> Tensor:
    q, k, v, beta = (inputs[name] for name in ("q", "k", "v", "beta"))
    return linear_attention(q, k, v, inputs.get("log_decay"), beta, scale=delta_scale(q))[0]


class _CausalAttention(torch.autograd.Function):
    """Causal attention as a single block of all tokens."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.scale = q.shape[-1] ** -0.5
        out, lse = attention.forward(q, k, v, CAUSAL, ctx.scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return attention.backward(grads[0], q, k, v, out, lse, CAUSAL, ctx.scale)


def _attention(inputs: Inputs) -> Tensor:
    return _CausalAttention.apply(inputs["q"], inputs["k"], inputs["v"])  # type: ignore[no-untyped-call]


def _norm_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    width = shape.heads * shape.head_dim
    weight = torch.ones(width, dtype=shape.torch_dtype, device=generator.device)
    return {"x": _tokens(shape, generator, width), "weight": weight}


def _rms_norm(inputs: Inputs) -> Tensor:
    return rms_norm(inputs["x"], inputs["weight"], EPS)


def _unit_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    return {"gate_up": _tokens(shape, generator, 2 * shape.heads * shape.head_dim)}


def _swiglu(inputs: Inputs) -> Tensor:
    return swiglu(inputs["gate_up"])


def _recurrence_flops(shape: Shape, *, chunk: int, delta: bool) -> int:
    return flops.recurrence(shape.tokens, shape.heads, shape.head_dim, shape.head_dim, chunk, delta=delta)


def _attention_flops(shape: Shape) -> int:
    return flops.causal_attention(shape.tokens, shape.heads, shape.head_dim, shape.head_dim)


def _additive_kernel(name: str, decay: Literal["constant", "head", "channel"]) -> Kernel:
    return Kernel(
        name,
        partial(_recurrence_inputs, decay=decay, beta=False),
        _additive,
        partial(_recurrence_flops, chunk=additive.VECTOR_CHUNK if decay == "channel" else additive.CHUNK, delta=False),
        constants=frozenset({"log_decay"}) if decay == "constant" else frozenset(),
    )


def _delta_kernel(name: str, decay: Literal["none", "head", "channel"]) -> Kernel:
    draw = partial(_recurrence_inputs, decay=decay, beta=True)
    return Kernel(name, draw, _delta, partial(_recurrence_flops, chunk=delta.CHUNK, delta=True))


_ALL = (
    _additive_kernel("lightning", "constant"),
    _additive_kernel("simple-gla", "head"),
    _additive_kernel("gla", "channel"),
    _delta_kernel("deltanet", "none"),
    _delta_kernel("gated-deltanet", "head"),
    _delta_kernel("kda", "channel"),
    Kernel("attention", _qkv, _attention, _attention_flops, recurrent=False),
    Kernel("rms-norm", _norm_inputs, _rms_norm, None, recurrent=False),
    Kernel("swiglu", _unit_inputs, _swiglu, None, recurrent=False),
)
KERNELS = {kernel.name: kernel for kernel in _ALL}
"""Kernels by name, in the order of the tables."""

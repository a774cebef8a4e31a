"""Pointwise steps of the GPU benchmark: functions that torch.compile fuses on CUDA, short convolution."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kernels import compare, timings
from longctx.bench.isolated import report
from longctx.kernels.convolution import causal_convolution
from longctx.kernels.loss import linear_cross_entropy
from longctx.kernels.pointwise import gated_rms_norm, rms_norm, swiglu
from longctx.layers.rotary import rotary_table, rotate

HEAD_DIM = 64
VOCABULARY = 320
TILE = 4096
Leaves = Sequence[Tensor]


@cache
def _table(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return rotary_table(torch.arange(rows, device=device), HEAD_DIM, 1e4)


@cache
def _gradient(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient of a result; cached, so that timings are without it. Rounded on the CPU, as for float64."""
    count = math.prod(shape)
    return torch.linspace(-1, 1, count, dtype=torch.float64).view(shape).to(dtype).to(device)


@cache
def _labels(rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device) % VOCABULARY


def _rotary(x: Tensor) -> Tensor:
    return rotate(x.unflatten(-1, (-1, HEAD_DIM)), _table(x.shape[1], x.device))


def _cross_entropy(x: Tensor, head: Tensor) -> Tensor:
    rows = x.shape[1]
    return linear_cross_entropy(x[0], head, _labels(rows, x.device), TILE, 1 / rows)[0]


FUNCTIONS: dict[str, Callable[[Leaves], Tensor]] = {
    "rms-norm": lambda x: rms_norm(x[0], x[1], 1e-5),
    "gated-rms-norm": lambda x: gated_rms_norm(x[0], x[1], x[2], 1e-5, "silu"),
    "swiglu": lambda x: swiglu(x[4]),
    "rotary": lambda x: _rotary(x[0]),
    "cross-entropy": lambda x: _cross_entropy(x[0], x[3]),
    "convolution": lambda x: causal_convolution(x[0], x[5], activation="silu"),
}
"""By name, of x `[1, T, D]`, weight `[D]`, gate `[1, T, D]`, head `[N, D]`, gate and value `[1, T, 2 D]`, and taps
`[D, 4]`."""


def draw(rows: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Draw the tensors of `FUNCTIONS`."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((1, rows, width), (width,), (1, rows, width), (VOCABULARY, width), (1, rows, 2 * width), (width, 4))
    x, weight, gate, head, pair, taps = (torch.randn(size, generator=generator, device=device) for size in sizes)
    return [y.to(dtype) for y in (x, weight, gate, width**-0.5 * head, pair, taps)]


def with_gradients(name: str, inputs: Leaves) -> tuple[Tensor, ...]:
    """Return a function's result and the gradients of what it takes."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = FUNCTIONS[name](leaves)
    out.backward(torch.ones_like(out) if out.dim() == 0 else _gradient(out.shape, out.dtype, out.device))
    return out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def check_pointwise(name: str, dtype: str, rows: int, width: int, device: str) -> dict[str, Any]:
    """Compare a function and its gradients with float64 on the CPU, where it is not fused."""
    inputs = draw(rows, width, getattr(torch, dtype), device)
    got = [x.cpu() for x in with_gradients(name, inputs)]
    want = with_gradients(name, [x.cpu().double() for x in inputs])
    names = ("out", *(f"gradient {number}" for number in range(1, len(want))))
    return compare(names, tuple(got), want, inputs[0].dtype)


def time_pointwise(name: str, dtype: str, rows: int, width: int, device: str, repeats: int) -> dict[str, Any]:
    """Time a function, forward, and forward and backward."""
    inputs = draw(rows, width, getattr(torch, dtype), device)

    def forward() -> None:
        with torch.no_grad():
            FUNCTIONS[name](inputs)

    def both() -> None:
        with_gradients(name, inputs)

    report({"rows": rows, "width": width})
    timings(forward, both, torch.device(device), repeats)
    return {}

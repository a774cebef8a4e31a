"""RMSNorm and SwiGLU on CPUs, in C++ (`longctx/kernels/native/pointwise.cpp`), for float32 and bf16.

A row is read and written once. `longctx.kernels.pointwise` has the equations, and runs what this cannot: float64,
tensors of several dtypes, and machines without a compiler.
"""

import ctypes

import torch
from torch import Tensor, nn

from longctx.kernels.native import library

FAMILY = "pointwise"
_DTYPES = (torch.float32, torch.bfloat16)
_ACTIVATIONS = {None: 0, "silu": 1, "sigmoid": 2}


class _Rows(ctypes.Structure):
    """`Rows` of pointwise.cpp."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_long))


class _Call(ctypes.Structure):
    """`Call` of pointwise.cpp."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "width", "brain", "threads", "activation")),
        ("eps", ctypes.c_float),
        ("weight", ctypes.c_void_p),
        ("dweight", ctypes.c_void_p),
        *((name, _Rows) for name in ("x", "scale", "gate", "grad", "out", "dscale", "dgate")),
    )


def is_supported(*rows: Tensor) -> bool:
    """Return whether the native kernels take these tensors, `[R, ...]` each."""
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == rows[0].dtype for x in rows)
        and rows[0].dtype in _DTYPES
        and not torch.compiler.is_compiling()
        and library.is_available(FAMILY)
    )


def _run(
    function: str,
    x: Tensor,
    width: int,
    *,
    eps: float = 0.0,
    activation: str | None = None,
    weight: Tensor | None = None,
    dweight: Tensor | None = None,
    **rows: Tensor | None,
) -> None:
    """Call an operator on rows of `width` results."""
    kept = {name: y if y.stride(1) == 1 else y.contiguous() for name, y in (rows | {"x": x}).items() if y is not None}
    brain = int(x.dtype == torch.bfloat16)
    call = _Call(len(x), width, brain, torch.get_num_threads(), _ACTIVATIONS[activation], eps)
    call.weight, call.dweight = (None if y is None else y.data_ptr() for y in (weight, dweight))
    for name, y in kept.items():
        setattr(call, name, _Rows(y.data_ptr(), y.stride(0)))
    library.call(FAMILY, function, call)


def _split_scale(scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale as a weight in float32, or as rows."""
    return (scale.float().contiguous(), None) if scale.dim() == 1 else (None, scale)


def norm(x: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None, activation: str | None = None) -> Tensor:
    """RMSNorm of rows `[R, D]`, for a scale `[D]` or `[R, D]`; with a gate `[R, D]`, times its activation."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    weight, rows = _split_scale(scale)
    _run("norm", x, x.shape[1], eps=eps, activation=activation, weight=weight, scale=rows, gate=gate, out=out)
    return out


def norm_grad(
    x: Tensor, grad: Tensor, scale: Tensor, eps: float, gate: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, of the scale (float32 where that is `[D]`), and of the gate."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    weight, rows = _split_scale(scale)
    dweight = None if weight is None else torch.empty_like(weight)
    dscale = None if rows is None else torch.empty_like(rows, memory_format=torch.contiguous_format)
    _run(
        "norm_grad", x, x.shape[1], eps=eps, activation=activation, weight=weight, dweight=dweight, scale=rows,
        gate=gate, grad=grad, out=dx, dscale=dscale, dgate=dgate,
    )  # fmt: skip
    found = dscale if dweight is None else dweight
    assert found is not None
    return dx, found, dgate


def swiglu(gate_up: Tensor) -> Tensor:
    """SwiGLU of rows `[R, 2 F]`."""
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _run("swiglu", gate_up, out.shape[1], out=out)
    return out


def swiglu_grad(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of rows `[R, 2 F]`."""
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    _run("swiglu_grad", gate_up, grad.shape[1], grad=grad, out=dgate_up)
    return dgate_up

"""Short causal convolution on CPUs, in C++ (`longctx/kernels/native/convolution.cpp`), for float32 and bf16.

Tokens are read and written once in each pass. `longctx.kernels.convolution` has the equations, and runs what this
cannot: float64, float16, and machines without a compiler.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longctx.kernels.native import library

FAMILY = "convolution"
_DTYPES = (torch.float32, torch.bfloat16)


class _Tokens(ctypes.Structure):
    """`Tokens` of convolution.cpp."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_long) for name in ("segment", "batch", "token")))


class _Call(ctypes.Structure):
    """`Call` of convolution.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_long)
            for name in (
                "batch", "length", "width", "taps", "brain", "silu", "threads", "segment_count", "start_count",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("bounds", "starts", "weight", "bias", "dweight", "dbias")),
        *((name, _Tokens) for name in ("x", "before", "out", "dout", "dx", "dbefore")),
    )  # fmt: skip


def is_supported(x: Tensor) -> bool:
    """Return whether the native kernels take tokens `[B, T, D]`."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and library.is_available(FAMILY)
    )


def _run(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
    *,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    **tokens: Tensor,
) -> None:
    """Call a pass on `tokens`, `[B, T, D]` or, before segments, `[N, B, J - 1, D]`."""
    numbers = (*x.shape, weight.shape[1], int(x.dtype == torch.bfloat16), int(activation == "silu"))
    call = _Call(*numbers, torch.get_num_threads(), len(bounds) // 2, len(starts))
    kept = [(ctypes.c_long * len(values))(*values) for values in (bounds, starts)]
    call.bounds, call.starts = (ctypes.addressof(values) for values in kept)
    parameters = [None if y is None else y.float().contiguous() for y in (weight, bias)]
    call.weight, call.bias, call.dweight, call.dbias = (
        None if y is None else y.data_ptr() for y in (*parameters, dweight, dbias)
    )
    rows = {name: y if y.stride(-1) == 1 else y.contiguous() for name, y in (tokens | {"x": x}).items()}
    for name, y in rows.items():
        setattr(call, name, _Tokens(y.data_ptr(), *(0, *y.stride())[-4:-1]))
    library.call(FAMILY, function, call)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> Tensor:
    """Compute y; see `longctx.kernels.convolution.causal_convolution`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run("forward", x, weight, bias, bounds, starts, activation, before=before, out=out)
    return out


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    bounds: Sequence[int],
    starts: Sequence[int],
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute dx, dweight, dbias (empty without bias) and dbefore, each in the dtype of its tensor."""
    dx, dbefore = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, before))
    shapes = (weight.shape, (0 if bias is None else len(bias),))
    dweight, dbias = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    _run(
        "backward", x, weight, bias, bounds, starts, activation, dweight=dweight, dbias=None if bias is None else dbias,
        before=before, dout=dy, dx=dx, dbefore=dbefore,
    )  # fmt: skip
    return dx, dweight.to(weight.dtype), dbias.to((weight if bias is None else bias).dtype), dbefore

"""Block attention on CPUs, in C++ (`longctx/kernels/native/attention.cpp`): float32 and bf16, every mask but a tensor.

Sums are in float32. Products of bf16 inputs multiply bf16 numbers where the CPU can, and float32 elsewhere. What a
query sees is two integers, so packed documents, windows and the halves of a zigzag rank are one pass, without a mask or
a call per tile, and grouped heads read their key head in place.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from longctx.kernels.attention.masks import PlainMask, Positions, key_bounds
from longctx.kernels.attention.tiled import Gradients, dense_rows
from longctx.kernels.native import library
from longctx.kernels.native.tensor import TensorArgument
from longctx.kernels.operator import register

FAMILY = "attention"
DTYPES = (torch.float32, torch.bfloat16)
FEWEST_QUERIES = 16
"""Fewer, as in decoding, do not pay for the transposes of keys."""


class _Call(ctypes.Structure):
    """`Call` of attention.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_long)
            for name in ("batch", "queries", "keys", "heads", "key_heads", "key_dim", "value_dim", "threads")
        ),
        ("scale", ctypes.c_float),
        *((name, TensorArgument) for name in ("q", "k", "v", "out", "dout")),
        *((name, ctypes.c_void_p) for name in ("lse", "dq", "dk", "dv", "begin", "end")),
        *((name, ctypes.c_long) for name in ("bounds_batch", "bounds_head")),
    )


class _Products(ctypes.Structure):
    """`Products` of attention.cpp."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("rows", "width", "count", "repeats", "brain", "threads"))


def is_built() -> bool:
    """Return whether native kernels are used and can be built here."""
    return library.is_available(FAMILY)


# As `torch.compiler.assume_constant_result` does, which imports torch's compiler: a second of each command that reads
# a recipe.
is_built._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run(
    function: str,
    rows: dict[str, Tensor],
    bounds: tuple[Tensor, Tensor],
    scale: float,
    lse: Tensor,
    grads: tuple[Tensor, ...] = (),
) -> None:
    """Call a pass on tensors `[B, T, H, D]` with dense channels; `grads` are dq, dk, dv."""
    q, k, v = rows["q"], rows["k"], rows["v"]
    batch, queries, heads, key_dim = q.shape
    call = _Call(
        batch, queries, k.shape[1], heads, k.shape[2], key_dim, v.shape[3], torch.get_num_threads(), scale,
    )  # fmt: skip
    for name, x in rows.items():
        setattr(call, name, TensorArgument.of(x))
    begin, end = (x.contiguous() for x in bounds)
    if begin.dim() == 3:
        call.bounds_batch, call.bounds_head = begin.stride()[:2]
    pointers = {"lse": lse, "begin": begin, "end": end} | dict(zip(("dq", "dk", "dv"), grads, strict=False))
    for name, x in pointers.items():
        setattr(call, name, x.data_ptr())
    library.call(FAMILY, function, call)


def _forward(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = map(dense_rows, (q, k, v))
    out, lse = _empty(q, k, v, begin, end, scale)
    _run("forward", {"q": q, "k": k, "v": v, "out": out}, (begin, end), scale, lse)
    return out, lse


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begin: Tensor, end: Tensor, scale: float
) -> Gradients:
    do, q, k, v, out = map(dense_rows, (do, q, k, v, out))
    _, dk, dv = _empty_grads(do, q, k, v)
    dq = q.new_zeros(q.shape, dtype=torch.float32)
    rows = {"q": q, "k": k, "v": v, "out": out, "dout": do}
    _run("backward", rows, (begin, end), scale, lse.float().contiguous(), (dq, dk, dv))
    return dq, dk, dv


def _empty(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    del k, rest
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return v.new_empty(*q.shape[:3], v.shape[3]), lse


def _empty_grads(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
    del do, rest
    dq, dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    return dq, dk, dv


def _pairs(q: Tensor, k: Tensor, begin: Tensor, end: Tensor) -> int:
    """Count the pairs of queries and keys that are seen; all of them where the bounds have no values."""
    batch, queries, heads, _ = q.shape
    if isinstance(begin, FakeTensor):
        return batch * heads * queries * k.shape[1]
    seen = int((end.long() - begin.long()).clamp_min(0).sum())
    return seen if begin.dim() == 3 else batch * heads * seen


def _flops(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, *rest: Any, **results: Any) -> int:
    del rest, results
    return 2 * _pairs(q, k, begin, end) * (q.shape[3] + v.shape[3])


def _grad_flops(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begin: Tensor, end: Tensor, *rest: Any,
    **results: Any,
) -> int:  # fmt: skip
    del do, out, lse, rest, results
    return 2 * _pairs(q, k, begin, end) * (3 * q.shape[3] + 2 * v.shape[3])


_INPUTS = "Tensor q, Tensor k, Tensor v"
_BOUNDS = "Tensor begin, Tensor end, float scale"
_attention = register(
    "attention_native", f"({_INPUTS}, {_BOUNDS}) -> (Tensor, Tensor)", _forward, _empty, _flops, values=True
)
_attention_grad = register(
    "attention_native_grad", f"(Tensor do, {_INPUTS}, Tensor out, Tensor lse, {_BOUNDS}) -> (Tensor, Tensor, Tensor)",
    _backward, _empty_grads, _grad_flops, values=True,
)  # fmt: skip


class Native:
    """The backend "cpu-native"."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: PlainMask | Positions, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out in v's dtype and lse in float32, shapes as in longctx.kernels.attention."""
        begin, end = key_bounds(mask, q.shape[1], k.shape[1], q.device)
        out, lse = _attention(q, k, v, begin, end, scale)
        return out, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: PlainMask | Positions,
        scale: float,
    ) -> Gradients:
        """Return dq, dk, dv in float32."""
        begin, end = key_bounds(mask, q.shape[1], k.shape[1], q.device)
        dq, dk, dv = _attention_grad(do, q, k, v, out, lse, begin, end, scale)
        return dq, dk, dv


def multiply_in_cache(dtype: torch.dtype, repeats: int) -> int:
    """Multiply matrices in each thread's cache, as the passes do, `repeats` times; return the FLOPs of all threads.

    The benchmark times it for the rate that the passes could reach.
    """
    rows, width, count, threads = 96, 64, 256, torch.get_num_threads()
    brain = int(dtype == torch.bfloat16)
    library.call(FAMILY, "products", _Products(rows, width, count, repeats, brain, threads))
    return 2 * rows * width * count * repeats * threads

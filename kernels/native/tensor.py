"""A tensor as the native kernels read it: `Tensor` of `longctx/kernels/native/factors.h`."""

import ctypes

import torch
from torch import Tensor


class TensorArgument(ctypes.Structure):
    """A tensor `[B, T, heads]`, or `[B, T, heads, D]` with contiguous D, float32 or bfloat16; data 0: none."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("brain", "batch", "token", "head", "heads")),
    )

    @classmethod
    def of(cls, x: Tensor) -> "TensorArgument":
        """Point to x, which has to outlive the call."""
        return cls(x.data_ptr(), int(x.dtype == torch.bfloat16), *x.stride()[:3], x.shape[2])

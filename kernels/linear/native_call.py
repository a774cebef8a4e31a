"""Calls of the native kernels of a recurrence: the structures of `longctx/kernels/native/recurrence.h`, filled in."""

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.native import library
from longctx.kernels.native.tensor import TensorArgument

DTYPES = (torch.float32, torch.bfloat16)


SIZES = ("rows", "length", "heads", "key_dim", "value_dim", "threads")


def fields(tensors: Iterable[str], numbers: Iterable[str], states: Iterable[str]) -> tuple[tuple[str, type], ...]:
    """Return the fields of a family's `Call`: sizes, tensors along the sequence, its own numbers, segments, states."""
    return (
        *((name, ctypes.c_long) for name in SIZES),
        *((name, TensorArgument) for name in tensors),
        *((name, ctypes.c_long) for name in (*numbers, "segment_count")),
        *((name, ctypes.c_void_p) for name in ("segments", "starts", *states)),
    )


class Pass:
    """A call of a native pass: its arguments, and the tensors that they point to."""

    def __init__(self, family: str, call: type[ctypes.Structure], inputs: Inputs, segments: Sequence[Segment]) -> None:
        self._family, self._inputs = family, inputs
        self._kept: list[Tensor] = []
        batch, heads, key_dim, value_dim = inputs.state_shape
        self._call = call(batch, inputs.k.shape[1], heads, key_dim, value_dim, torch.get_num_threads())
        self._call.q.heads = heads  # of a pass that reads no states
        bounds: list[int] = []
        starts: list[int] = []
        for s in segments:
            bounds += [s.begin, s.end, len(s.starts), len(starts)]
            starts += [s.begin + start for start in s.starts]
        self._call.segment_count = len(segments)
        of_segments, of_starts = (torch.tensor(x, dtype=torch.int64, device="cpu") for x in (bounds, starts))
        self.point(segments=of_segments, starts=of_starts)

    def point(self, **tensors: Tensor) -> None:
        """Set pointers to tensors that the pass reads, made contiguous: states in float32."""
        self.fill(**{name: x.contiguous() for name, x in tensors.items()})

    def fill(self, **tensors: Tensor) -> None:
        """Set pointers to contiguous tensors that the pass writes."""
        for name, x in tensors.items():
            assert x.is_contiguous(), name
            self._kept.append(x)
            setattr(self._call, name, x.data_ptr())

    def rows(self, **tensors: Tensor) -> None:
        """Set tensors `[B, T, heads]` or `[B, T, heads, D]`; those of another dtype than `DTYPES` become float32."""
        for name, x in tensors.items():
            x = x if x.dtype in DTYPES else x.float()
            x = x if x.dim() == 3 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
            self._kept.append(x)
            setattr(self._call, name, TensorArgument.of(x))

    def set(self, **numbers: int) -> None:
        """Set numbers of the family's own."""
        for name, number in numbers.items():
            setattr(self._call, name, number)

    def run(self, function: str) -> None:
        """Call the pass."""
        library.call(self._family, function, self._call)

    def empty_states(self, segments: Sequence[Segment]) -> Tensor:
        """Allocate a state per segment, `[N, B, H, K, V]` float32."""
        return torch.empty((len(segments), *self._inputs.state_shape), dtype=torch.float32, device="cpu")


class Grad:
    """The gradient of x `[B, T, heads]` or `[B, T, heads, D]`, computed in parts, one per state that reads a head."""

    def __init__(self, x: Tensor, heads: int, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of the parts, x's without it where no head is shared."""
        self._x, self._shared = x, heads // x.shape[2]
        self.parts = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        if self._shared > 1:
            self.parts = torch.empty((*x.shape[:2], heads, *x.shape[3:]), dtype=torch.float32, device="cpu")

    def value(self) -> Tensor:
        """Return the gradient, in the dtype of x."""
        if self._shared == 1:
            return self.parts.to(self._x.dtype)
        return self.parts.unflatten(2, (self._x.shape[2], self._shared)).sum(dim=3).to(self._x.dtype)

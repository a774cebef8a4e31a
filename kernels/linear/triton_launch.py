"""Host side of the Triton recurrences: launch plan, strides, gradient buffers, segment bounds and document ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from longctx.kernels.device import DeviceCopy, launch_device
from longctx.kernels.linear import tuning
from longctx.kernels.linear.recurrence import Inputs, Segment

MIN_SEGMENT, MAX_SEGMENT = 1024, 2048
PROGRAMS_PER_SM = 4
_MAX_TOKEN_STRIDE = 2**24
"""Elements between tokens below which offsets within a chunk of 128 fit an int32."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Strides = tuple[int, int, int]


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """Return the most tokens per segment, for an occupancy of about 4 programs per multiprocessor.

    At least 1024: with shorter segments, states would be more than a quarter of the forward HBM traffic. At most 2048,
    since the rounding errors of the decays' gradients add up along a segment.
    """
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tokens = heads * length // (PROGRAMS_PER_SM * multiprocessors)
    return min(max(MIN_SEGMENT, 1 << max(tokens - 1, 0).bit_length()), MAX_SEGMENT)


@dataclass(frozen=True)
class LaunchPlan:
    """Launch plan of one pass: what its kernel launches share, namely sizes, dtype, decay and segments."""

    length: int
    batch: int
    heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    log_decay: Tensor | None
    segments: tuple[Segment, ...]
    prefix: str
    """Prefix of the recurrence's kernel names in `longctx.kernels.linear.tuning`."""

    @property
    def decay_kind(self) -> str:
        """One of tuning.DECAY_KINDS."""
        if self.log_decay is None or self.log_decay.dim() == 1:
            return "constant"
        return "scalar" if self.log_decay.dim() == 3 else "vector"

    @property
    def gate(self) -> tuple[Tensor, Strides]:
        """The log-decay, zeros where there is none, and its strides of B, T and H."""
        if self.log_decay is None:
            return torch.zeros(self.heads, device=self.device), (0, 0, 1)
        if self.log_decay.dim() == 1:
            return self.log_decay, (0, 0, self.log_decay.stride(0))
        return with_strides(self.log_decay) if self.log_decay.dim() == 4 else gate_with_strides(self.log_decay)

    @property
    def gate_group(self) -> int:
        """States per head of the decay."""
        if self.log_decay is None:
            return 1
        return self.heads // self.log_decay.shape[0 if self.log_decay.dim() == 1 else 2]

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Begin and end token of each segment."""
        return tuple((segment.begin, segment.end) for segment in self.segments)

    @property
    def readers(self) -> int:
        """Query heads per state, 1 where states share a query head."""
        return max(1, self.query_heads // self.heads)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """`[N, B, H, K, V]`."""
        return (len(self.segments), self.batch, self.heads, self.key_dim, self.value_dim)

    @property
    def dot_dtype(self) -> torch.dtype:
        """The dtype of a product's factors."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def precision(self) -> dict[str, Any]:
        """Constants of a kernel's products: the factors' dtype, and the precision of float32 products.

        float32 products of constant and scalar decays are of three tf32 products each ("tf32x3"): factors are rounded
        to 11 bits and the rest to 11 more, and the product of both rests, 2^-22 of the whole, is left out. That is
        close to float32's own accuracy, on tensor cores; float32's own instructions keep so many factors in registers
        that at 128 channels the assembler gives up and keeps everything in memory. Running states and outputs are added
        outside of the tensor cores, which cut sums instead of rounding them: a product sums at most 64 numbers.
        """
        if self.dtype == torch.bfloat16:
            return {"DOT": tl.bfloat16, "PRECISION": "tf32"}
        # allow_tf32 raises once anybody has set fp32_precision; this has what was set in either way.
        exact = self.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
        split = not self.prefix and self.decay_kind != "vector"
        return {"DOT": tl.float32, "PRECISION": ("tf32x3" if split else "ieee") if exact else "tf32"}

    def tile_sizes(self, name: str) -> tuning.TileSizes:
        """Return the tile sizes of one of the recurrence's kernels, by its name without the prefix."""
        kernel = f"{self.prefix}{name}/{self.decay_kind}"
        return tuning.choose_tiles(kernel, self.key_dim, self.value_dim, self.dtype, self.device)

    def state_tiles(self, sizes: tuning.TileSizes) -> int:
        """Return the number of tiles of K x V per state."""
        return -(-self.key_dim // sizes["block_k"]) * -(-self.value_dim // sizes["block_v"])

    def group_sizes(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
        """Return the kernels' grouping constants: outputs per head of q, states per head of k, v and the decay."""
        return {
            "Q_GROUP": self.heads * self.readers // q.shape[2],
            "K_GROUP": self.heads // k.shape[2],
            "V_GROUP": self.heads // v.shape[2],
            "GATE_GROUP": self.gate_group,
            "READERS": self.readers,
        }

    def launch(self, kernel: Any, sizes: tuning.TileSizes, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch `programs` instances of a kernel; no launch for 0."""
        if not programs:
            return
        shape = {
            "K": self.key_dim,
            "V": self.value_dim,
            "KIND": self.decay_kind,
            "C": sizes["chunk"],
            "BK": sizes["block_k"],
            "BV": sizes["block_v"],
        }
        with launch_device(self.device):
            kernel[(programs,)](
                *arguments,
                self.heads,
                self.batch,
                **{name: value for name, value in shape.items() if name in kernel.arg_names},
                num_warps=sizes["warps"],
                num_stages=sizes["stages"],
                **self.precision,
                **constants,
            )


def plan_launch(
    recurrence: str, inputs: Inputs, log_decay: Tensor | None, segments: Sequence[Segment], queries: bool
) -> LaunchPlan:
    """Return the launch plan of one pass of `recurrence`, "additive" or "delta"; `queries`: its kernels read q.

    `LinearRecurrence.check` has checked the shapes. Raises ValueError for dtypes and head dims that the kernels do not
    support.
    """
    k, v, heads = inputs.k, inputs.v, inputs.heads
    if k.dtype not in _DTYPES:
        raise ValueError(
            f"the Triton recurrence supports float32, bfloat16 and float16, not {k.dtype}: "
            f"use longctx.kernels.linear.{recurrence}.chunked (torch operators)"
        )
    if max(k.shape[3], v.shape[3]) > tuning.MAX_HEAD_DIM:
        raise ValueError(
            f"the Triton recurrence supports head dims up to {tuning.MAX_HEAD_DIM}, not K {k.shape[3]} and "
            f"V {v.shape[3]}: use more heads of fewer channels, or longctx.kernels.linear.{recurrence}.chunked"
        )
    return LaunchPlan(
        batch=k.shape[0],
        length=k.shape[1],
        heads=heads,
        query_heads=inputs.queries.shape[2] if queries else heads,
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        dtype=k.dtype,
        device=k.device,
        log_decay=log_decay,
        segments=tuple(segments),
        prefix="delta_" if recurrence == "delta" else "",
    )


def with_strides(x: Tensor) -> tuple[Tensor, Strides]:
    """Return x with contiguous channels, copied if need be, and its strides of B, T and H."""
    if x.stride(-1) != 1 or x.stride(1) >= _MAX_TOKEN_STRIDE:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def gate_with_strides(x: Tensor) -> tuple[Tensor, Strides]:
    """Return a gate `[B, T, H]`, copied if its token stride is too large, and its strides."""
    if x.stride(1) >= _MAX_TOKEN_STRIDE:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def maybe_with_strides(x: Tensor | None) -> tuple[Tensor | None, Strides]:
    """As `with_strides`; for None, the arguments of an absent tensor."""
    return (None, (0, 0, 0)) if x is None else with_strides(x)


def allocate_grad(x: Tensor, heads: int) -> Tensor:
    """Allocate the gradient of x `[B, T, Hx, D]` that a kernel writes per state or output.

    Like x, or float32 `[B, T, heads, D]` where several of these `heads` share a head of x.
    """
    if x.shape[2] == heads:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty(*x.shape[:2], heads, x.shape[3], dtype=torch.float32, device=x.device)


def reduce_to_heads(grad: Tensor, x: Tensor) -> Tensor:
    """Sum a gradient of `allocate_grad` over the heads that share a head of x, and cast it to x's dtype."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    return grad.unflatten(2, (x.shape[2], -1)).sum(dim=3).to(x.dtype)


@lru_cache(maxsize=512)
def _bounds_copy(bounds: tuple[tuple[int, int], ...], device: torch.device) -> DeviceCopy:
    return DeviceCopy(torch.tensor(bounds, dtype=torch.int32).view(-1, 2), device)


def bounds_tensor(bounds: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return begin and end tokens on the device, `[N, 2]` int32; cached, since all layers of a model use the same.

    The delta rule at a million tokens has tens of such tensors per layout, a few kilobytes each.
    """
    return _bounds_copy(bounds, device).tensor()


@lru_cache(maxsize=4)
def _document_ids_copy(segments: tuple[Segment, ...], device: torch.device) -> DeviceCopy:
    ids = torch.zeros(max(segment.end for segment in segments), dtype=torch.int32)
    for segment in segments:
        if segment.starts:
            starts = torch.tensor(segment.starts, dtype=torch.int32)
            ids[segment.begin + starts] = starts + 1
            ids[segment.at] = ids[segment.at].cummax(0).values
    return DeviceCopy(ids, device)


def segment_document_ids(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """Return each token's document in its segment, `[T]` int32; None where no document starts in a segment.

    A document's id is 1 more than its first token within the segment, 0 where it began before: tokens of equal ids are
    of one document, and the id bounds the tokens that one of them sees.
    """
    return _document_ids_copy(segments, device).tensor() if any(segment.starts for segment in segments) else None


@lru_cache(maxsize=64)
def _document_start_copy(has_start: tuple[bool, ...], device: torch.device) -> DeviceCopy:
    return DeviceCopy(torch.tensor(has_start), device)


def document_start_mask(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """Return `[N]` bool, true for segments in which a document starts; None where there are none."""
    has_start = tuple(bool(segment.starts) for segment in segments)
    return _document_start_copy(has_start, device).tensor() if any(has_start) else None


def after_last_start(segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """Return the tokens `[begin, end)` of each segment that reach its end state: those from its last document on."""
    return tuple((s.begin + (s.starts[-1] if s.starts else 0), s.end) for s in segments)


def before_first_start(segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """Return the tokens `[begin, end)` of each segment that read its start state: those before its first start."""
    return tuple((s.begin, s.begin + s.starts[0] if s.starts else s.end) for s in segments)

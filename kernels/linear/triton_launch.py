"""What the Triton recurrences do on the host: sizes of one call, launches, memory as the kernels read it, documents."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from longctx.kernels.linear import tuning
from longctx.kernels.linear.recurrence import Gates, Segment, state_heads

SHORTEST_SEGMENT, LONGEST_SEGMENT = 1024, 2048
PROGRAMS_PER_PROCESSOR = 4
_FARTHEST = 2**24
"""Elements between tokens, so that a place within a chunk of 128 is an int32."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Strides = tuple[int, int, int]


def segment_length(heads: int, length: int, device: torch.device) -> int:
    """The most tokens of a segment: short enough for about 4 programs on each of the device's processors.

    At least 1024: below it the states would be more than a quarter of the forward traffic. At most 2048, since the
    rounding errors of the decays' gradients add up along a segment.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = heads * length // (PROGRAMS_PER_PROCESSOR * processors)
    return min(max(SHORTEST_SEGMENT, 1 << max(wanted - 1, 0).bit_length()), LONGEST_SEGMENT)


@dataclass(frozen=True)
class LaunchShape:
    """What the launches of one call share: sizes, the decay as the kernels take it, and where the segments lie."""

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
    """Of the names of the recurrence's kernels in `longctx.kernels.linear.tuning`."""

    @property
    def decay_kind(self) -> str:
        """One of tuning.DECAYS."""
        if self.log_decay is None or self.log_decay.dim() == 1:
            return "constant"
        return "scalar" if self.log_decay.dim() == 3 else "vector"

    @property
    def gate(self) -> tuple[Tensor, Strides]:
        """The decay, one of 0 where there is none, and its strides of B, T and H."""
        if self.log_decay is None:
            return torch.zeros(self.heads, device=self.device), (0, 0, 1)
        if self.log_decay.dim() == 1:
            return self.log_decay, (0, 0, self.log_decay.stride(0))
        return with_strides(self.log_decay) if self.log_decay.dim() == 4 else number_strides(self.log_decay)

    @property
    def gate_share(self) -> int:
        """How many states share a head of the decay."""
        if self.log_decay is None:
            return 1
        return self.heads // self.log_decay.shape[0 if self.log_decay.dim() == 1 else 2]

    @property
    def whole(self) -> tuple[tuple[int, int], ...]:
        """Where the segments begin and end."""
        return tuple((segment.begin, segment.end) for segment in self.segments)

    @property
    def readers(self) -> int:
        """Outputs of a state: its query heads, or one where states share a query head."""
        return max(1, self.query_heads // self.heads)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """`[N, B, H, K, V]`."""
        return (len(self.segments), self.batch, self.heads, self.key_dim, self.value_dim)

    @property
    def dot_dtype(self) -> torch.dtype:
        """The dtype in which factors are multiplied."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def precision(self) -> dict[str, Any]:
        """The dtype of products, and how float32 ones are made."""
        if self.dtype == torch.bfloat16:
            return {"DOT": tl.bfloat16, "PRECISION": "tf32"}
        exact = self.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {"DOT": tl.float32, "PRECISION": "ieee" if exact else "tf32"}

    def blocks(self, name: str) -> tuning.Blocks:
        """Tile sizes of one of the recurrence's kernels in tuning.KERNELS."""
        kernel = f"{self.prefix}{name}/{self.decay_kind}"
        return tuning.choose_tiles(kernel, self.key_dim, self.value_dim, self.dtype, self.device)

    def tiles(self, blocks: tuning.Blocks) -> int:
        """How many blocks of K and V a state is cut into."""
        return -(-self.key_dim // blocks["block_k"]) * -(-self.value_dim // blocks["block_v"])

    def shares(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
        """How many outputs share a head of q, how many states one of k, v and the decay, and the outputs of a state."""
        return {
            "Q_SHARE": self.heads * self.readers // q.shape[2],
            "K_SHARE": self.heads // k.shape[2],
            "V_SHARE": self.heads // v.shape[2],
            "GATE_SHARE": self.gate_share,
            "READERS": self.readers,
        }

    def launch(self, kernel: Any, blocks: tuning.Blocks, programs: int, *arguments: Any, **constants: Any) -> None:
        """Run so many programs; with none, nothing."""
        if not programs:
            return
        on: AbstractContextManager[Any] = (
            torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        )
        with on:
            kernel[(programs,)](
                *arguments,
                self.heads,
                self.batch,
                K=self.key_dim,
                V=self.value_dim,
                KIND=self.decay_kind,
                C=blocks["chunk"],
                BK=blocks["block_k"],
                BV=blocks["block_v"],
                num_warps=blocks["warps"],
                num_stages=blocks["stages"],
                **self.precision,
                **constants,
            )


def pose(
    recurrence: str,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    log_decay: Tensor | None,
    segments: Sequence[Segment],
    query_heads: int | None = None,
) -> LaunchShape:
    """The problem that the tensors pose to `recurrence`, "additive" or "delta", where its kernels take it.

    `LinearRecurrence.check` has seen the shapes. Errors: ValueError for other dtypes and larger head dims.
    """
    if k.dtype not in _DTYPES:
        raise ValueError(
            f"the Triton recurrence takes float32, bfloat16 and float16, not {k.dtype}: "
            f"longctx.kernels.linear.{recurrence}.chunked takes it, in torch operators"
        )
    if max(k.shape[3], v.shape[3]) > tuning.LARGEST_DIM:
        raise ValueError(
            f"the Triton recurrence takes head dims up to {tuning.LARGEST_DIM}, not K {k.shape[3]} and V {v.shape[3]}: "
            f"use more heads of fewer channels, or longctx.kernels.linear.{recurrence}.chunked"
        )
    heads = state_heads(k, v, gates)
    return LaunchShape(
        batch=k.shape[0],
        length=k.shape[1],
        heads=heads,
        query_heads=query_heads or heads,
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        dtype=k.dtype,
        device=k.device,
        log_decay=log_decay,
        segments=tuple(segments),
        prefix="delta_" if recurrence == "delta" else "",
    )


def with_strides(x: Tensor) -> tuple[Tensor, Strides]:
    """x with neighbouring channels, as the kernels read them, and its strides of B, T and H."""
    if x.stride(-1) != 1 or x.stride(1) >= _FARTHEST:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def number_strides(x: Tensor) -> tuple[Tensor, Strides]:
    """A gate `[B, T, H]` and its strides."""
    if x.stride(1) >= _FARTHEST:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def maybe_with_strides(x: Tensor | None) -> tuple[Tensor | None, Strides]:
    """`with_strides`, or what the kernels take for a tensor that is not there."""
    return (None, (0, 0, 0)) if x is None else with_strides(x)


def per_head(x: Tensor, heads: int) -> Tensor:
    """What the gradient of x `[B, T, H, D]` is written to: like x, or float32 with `heads` heads where these share
    those of x."""
    if x.shape[2] == heads:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty(*x.shape[:2], heads, x.shape[3], dtype=torch.float32, device=x.device)


def to_shared(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x `[B, T, H, ...]` from that of what shares its heads."""
    if grad.shape == x.shape:
        return grad.to(x.dtype)
    return grad.unflatten(2, (x.shape[2], -1)).sum(dim=3).to(x.dtype)


def _on_device(x: Tensor, device: torch.device) -> Tensor:
    """Move a tensor of the host without waiting for the device."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


@lru_cache(maxsize=16)
def bounds_on(bounds: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Begins and ends, `[N, 2]` int32. All layers of a model have the same."""
    return _on_device(torch.tensor(bounds, dtype=torch.int32).view(-1, 2), device)


@lru_cache(maxsize=4)
def documents(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """`[T]` int32: how many documents have begun in a token's segment up to it. None where none begins anywhere."""
    if not any(segment.starts for segment in segments):
        return None
    ids = torch.zeros(max(segment.end for segment in segments), dtype=torch.int32)
    for segment in segments:
        if segment.starts:
            ids[[segment.begin + start for start in segment.starts]] = 1
            ids[segment.at] = ids[segment.at].cumsum(0, dtype=torch.int32)
    return _on_device(ids, device)


@lru_cache(maxsize=4)
def cut_off(segments: tuple[Segment, ...], device: torch.device) -> Tensor | None:
    """`[N]` bool: in which segments documents begin. None where in none."""
    cut = [bool(segment.starts) for segment in segments]
    return _on_device(torch.tensor(cut), device) if any(cut) else None


def after_last_start(segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """Where the segments begin and end for the state that leaves them: a start drops what came before it."""
    return tuple((s.begin + (s.starts[-1] if s.starts else 0), s.end) for s in segments)


def before_first_start(segments: Sequence[Segment]) -> tuple[tuple[int, int], ...]:
    """Where the segments begin and end for the gradient of the state that enters them."""
    return tuple((s.begin, s.begin + s.starts[0] if s.starts else s.end) for s in segments)

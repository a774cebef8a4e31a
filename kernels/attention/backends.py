"""Which implementation of block attention takes which call, and why another one does not."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.kernels.attention.masks import BlockMask, Positions
from longctx.kernels.attention.tiled import Gradients, Tiled
from longctx.kernels.attention.vendor import CpuFlash, CudaCudnn, CudaFlash, FlashAttn


class Backend(Protocol):
    """Shapes as in longctx.kernels.attention; results in any dtype at least as wide as the inputs'.

    The lse is the true one of the block, natural logarithm, -inf for a query that sees nothing.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
        """out and lse of the block."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Any, scale: float
    ) -> Gradients:
        """This block's share of dq, dk, dv, with the global out and lse."""


@dataclass(frozen=True)
class Call:
    """A call of block attention, as far as backends differ in what they take."""

    device: torch.device
    dtype: torch.dtype
    mask: BlockMask
    head_dim: int
    """The larger of those of keys and values."""
    tiles: int
    """Tiles of 128 x 128, by all heads that have a mask of their own."""


def describe(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Call:
    """What the choice of a backend depends on."""
    masks = q.shape[0] * q.shape[2] if isinstance(mask, Positions) and mask.query.dim() == 3 else 1
    tiles = masks * -(-q.shape[1] // 128) * -(-k.shape[1] // 128)
    return Call(q.device, q.dtype, mask, max(q.shape[3], v.shape[3]), tiles)


HALF = (torch.bfloat16, torch.float16)


def _library_lacks(call: Call) -> str | None:
    """What CUDA's libraries for attention have in common."""
    if call.device.type != "cuda":
        return f"it runs on CUDA, and the tensors are on {call.device.type}"
    if call.dtype not in HALF:
        return f"it takes bf16 and fp16, not {_name(call.dtype)}"
    if isinstance(call.mask, Positions):
        return "it takes no mask by positions"
    if isinstance(call.mask, Tensor):
        return "it takes no mask tensor"
    if call.head_dim > 256:
        return f"it takes head dims up to 256, not {call.head_dim}"
    if torch.cuda.get_device_capability(call.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _cpu_flash_lacks(call: Call) -> str | None:
    return None if call.device.type == "cpu" else f"it runs on CPUs, and the tensors are on {call.device.type}"


def _cuda_flash_lacks(call: Call) -> str | None:
    if lacks := _library_lacks(call):
        return lacks
    return None if torch.backends.cuda.is_flash_attention_available() else "this build of torch has no FlashAttention"


def _cudnn_lacks(call: Call) -> str | None:
    if lacks := _library_lacks(call):
        return lacks
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    if call.head_dim > 128:
        return f"it takes head dims up to 128, not {call.head_dim}"
    return None


@cache
def _flash_attn_version() -> tuple[int, int] | None:
    try:
        major, minor, *_ = importlib.metadata.version("flash_attn").split(".")
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def _flash_attn_lacks(call: Call) -> str | None:
    version = _flash_attn_version()
    if version is None:
        return "the package flash_attn is not installed"
    if not (2, 7) <= version < (3, 0):
        return f"it needs flash_attn 2.7 or a later 2.x, and {version[0]}.{version[1]} is installed"
    return _library_lacks(call)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_lacks(call: Call) -> str | None:
    if not _has_triton():
        return "the package triton is not installed (pip install 'longctx[triton]')"
    if isinstance(call.mask, Tensor):
        return "it takes no mask tensor"
    if call.dtype not in (*HALF, torch.float32):
        return f"it takes bf16, fp16 and float32, not {_name(call.dtype)}"
    from longctx.kernels.attention import triton as attention_triton

    if call.head_dim > attention_triton.MAX_HEAD_DIM:
        return f"it takes head dims up to {attention_triton.MAX_HEAD_DIM}, not {call.head_dim}"
    if call.device.type != "cuda" and not attention_triton.INTERPRETED:
        return f"it runs on CUDA, and the tensors are on {call.device.type}"
    return None


FLEX_TILES = 2**26
"""Entries of the map of tiles that FlexAttention may make: 1 GiB in int32 for keys and queries, with its indices."""


def _flex_lacks(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"it runs on CUDA (elsewhere it makes the whole score matrix), and the tensors are on {call.device.type}"
    if not _has_triton():
        return "it is compiled with triton, which is not installed (pip install 'longctx[triton]')"
    if call.dtype not in (*HALF, torch.float32):
        return f"it takes bf16, fp16 and float32, not {_name(call.dtype)}"
    if isinstance(call.mask, Tensor):
        return "it takes no mask tensor"
    if call.head_dim > 256:
        return f"it takes head dims up to 256, not {call.head_dim}"
    if call.tiles > FLEX_TILES:
        return f"its map of tiles would have {call.tiles} entries"
    return None


def _any_lacks(call: Call) -> str | None:
    return None


def _triton() -> Backend:
    from longctx.kernels.attention import triton as attention_triton

    return attention_triton


def _flex() -> Backend:
    from longctx.kernels.attention.flex import Flex

    return Flex()


@dataclass(frozen=True)
class Entry:
    """A backend: what it lacks for a call (None: nothing), and how to get it."""

    lacks: Callable[[Call], str | None]
    load: Callable[[], Backend]


BACKENDS = {
    "cpu-flash": Entry(_cpu_flash_lacks, CpuFlash),
    "cuda-flash": Entry(_cuda_flash_lacks, CudaFlash),
    "flash-attn": Entry(_flash_attn_lacks, FlashAttn),
    "triton": Entry(_triton_lacks, _triton),
    "cuda-cudnn": Entry(_cudnn_lacks, CudaCudnn),
    "flex": Entry(_flex_lacks, _flex),
    "tiled": Entry(_any_lacks, Tiled),
}
"""In the order in which they are tried. cuDNN and FlexAttention make a plan or a kernel for each new shape, and packed
documents have a new shape each batch; so they come after those that do not."""


def explain_backends(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> dict[str, str | None]:
    """For each backend what it lacks for this call, None where it could take it; in the order of preference."""
    call = describe(q, k, v, mask)
    return {name: entry.lacks(call) for name, entry in BACKENDS.items()}


def choose_backend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, backend: str | None = None) -> Backend:
    """The first backend that lacks nothing, or the one that is named.

    Raises ValueError where the named one does not exist or cannot take the call, naming those that could.
    """
    if backend is None:
        call = describe(q, k, v, mask)
        return next(entry for entry in BACKENDS.values() if entry.lacks(call) is None).load()
    if backend not in BACKENDS:
        raise ValueError(f"attention: there is no backend {backend!r}; there are {', '.join(BACKENDS)}")
    reasons = explain_backends(q, k, v, mask)
    if reasons[backend] is not None:
        able = ", ".join(name for name, lacks in reasons.items() if lacks is None)
        raise ValueError(f"attention: the backend {backend!r} cannot: {reasons[backend]}. These can: {able}")
    return BACKENDS[backend].load()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Backends of block attention: which implementation computes a call, and why the others do not support it."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from longctx.kernels.attention import native
from longctx.kernels.attention.masks import BlockMask, Positions
from longctx.kernels.attention.tiled import Gradients, Tiled
from longctx.kernels.attention.vendor import CpuFlash, CudaCudnn, CudaFlash, FlashAttn


class Backend(Protocol):
    """An implementation. Shapes as in longctx.kernels.attention; results in any dtype at least as wide as the inputs'.

    The lse is the block's own, natural logarithm, -inf for a query that sees nothing.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
        """Return out and lse of the block."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Any, scale: float
    ) -> Gradients:
        """Return the block's contributions to dq, dk, dv, from the global out and lse."""


@dataclass(frozen=True)
class Call:
    """A call of block attention: the properties that decide which backends support it."""

    device: torch.device
    dtype: torch.dtype
    mask: BlockMask
    head_dim: int
    """The larger one of keys and values."""
    tiles: int
    """Tiles of 128 x 128, times the heads where each has its own mask."""
    lengths: tuple[int, int] = (0, 0)
    """Queries and keys."""
    reproducible: bool = False
    """Whether it is a backward pass that has to repeat bitwise."""


def describe(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, backward: bool = False) -> Call:
    """Collect the properties on which the choice of a backend depends."""
    masks = q.shape[0] * q.shape[2] if isinstance(mask, Positions) and mask.query.dim() == 3 else 1
    tiles = masks * -(-q.shape[1] // 128) * -(-k.shape[1] // 128)
    reproducible = backward and torch.are_deterministic_algorithms_enabled()
    lengths = q.shape[1], k.shape[1]
    return Call(q.device, q.dtype, mask, max(q.shape[3], v.shape[3]), tiles, lengths, reproducible)


HALF = (torch.bfloat16, torch.float16)


def _library_refusal(call: Call) -> str | None:
    """Check the limits that CUDA's attention libraries have in common."""
    if call.device.type != "cuda":
        return f"it runs on CUDA, and the tensors are on {call.device.type}"
    if call.dtype not in HALF:
        return f"it supports bf16 and fp16, not {_name(call.dtype)}"
    if isinstance(call.mask, Positions):
        return "it supports no mask by positions"
    if isinstance(call.mask, Tensor):
        return "it supports no mask tensor"
    if call.head_dim > 256:
        return f"it supports head dims up to 256, not {call.head_dim}"
    if torch.cuda.get_device_capability(call.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def _cpu_native_refusal(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"it runs on CPUs, and the tensors are on {call.device.type}"
    if isinstance(call.mask, Tensor):
        return "it supports no mask tensor"
    if call.dtype not in native.DTYPES:
        return f"it supports float32 and bf16, not {_name(call.dtype)}"
    if 0 < call.lengths[0] < native.FEWEST_QUERIES:
        return f"it takes at least {native.FEWEST_QUERIES} queries, not {call.lengths[0]}"
    return None if native.is_built() else "native kernels are turned off, or cannot be built here (docs/cpu.md)"


def _cpu_flash_refusal(call: Call) -> str | None:
    return None if call.device.type == "cpu" else f"it runs on CPUs, and the tensors are on {call.device.type}"


def _cuda_flash_refusal(call: Call) -> str | None:
    if refusal := _library_refusal(call):
        return refusal
    return None if torch.backends.cuda.is_flash_attention_available() else "this build of torch has no FlashAttention"


def _cudnn_refusal(call: Call) -> str | None:
    if refusal := _library_refusal(call):
        return refusal
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    if call.head_dim > 128:
        return f"it supports head dims up to 128, not {call.head_dim}"
    if call.reproducible:
        return "its backward pass does not repeat bitwise, and torch.use_deterministic_algorithms is on"
    return None


PLAN_GRAIN = 1024
"""Tokens: cuDNN builds a plan for each new shape, in 0.07 to 1.1 s on an H100 host, so it goes ahead only for lengths
that are multiples of this, which few are, and which are long enough for it to be faster."""


def _cudnn_is_faster(call: Call) -> bool:
    """Whether cuDNN goes ahead of FlashAttention: on Hopper and later, which FlashAttention 2 was not written for.

    On an H100 (docs/gpu.md) it takes 0.46 to 0.56 of the time forward from 4096 tokens on, and 0.6 backward.
    """
    if call.device.type != "cuda" or torch.cuda.get_device_capability(call.device) < (9, 0):
        return False
    return min(call.lengths) > 0 and all(length % PLAN_GRAIN == 0 for length in call.lengths)


@cache
def _flash_attn_version() -> tuple[int, int] | None:
    try:
        major, minor, *_ = importlib.metadata.version("flash_attn").split(".")
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor)


def _flash_attn_refusal(call: Call) -> str | None:
    version = _flash_attn_version()
    if version is None:
        return "the package flash_attn is not installed"
    if not (2, 7) <= version < (3, 0):
        return f"it needs flash_attn 2.7 or a later 2.x, and {version[0]}.{version[1]} is installed"
    return _library_refusal(call)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_refusal(call: Call) -> str | None:
    if not _has_triton():
        return "the package triton is not installed (pip install -e '.[triton]')"
    if isinstance(call.mask, Tensor):
        return "it supports no mask tensor"
    if call.dtype not in (*HALF, torch.float32):
        return f"it supports bf16, fp16 and float32, not {_name(call.dtype)}"
    from longctx.kernels.attention import triton as attention_triton

    if call.head_dim > attention_triton.MAX_HEAD_DIM:
        return f"it supports head dims up to {attention_triton.MAX_HEAD_DIM}, not {call.head_dim}"
    if call.device.type != "cuda" and not attention_triton.INTERPRETED:
        return f"it runs on CUDA, and the tensors are on {call.device.type}"
    return None


FLEX_TILES = 2**26
"""The most entries of FlexAttention's block mask: 1 GiB in int32 for keys and queries, with its indices."""


def _flex_refusal(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"it runs on CUDA (elsewhere it makes the whole score matrix), and the tensors are on {call.device.type}"
    if not _has_triton():
        return "it is compiled with triton, which is not installed (pip install -e '.[triton]')"
    if call.dtype not in (*HALF, torch.float32):
        return f"it supports bf16, fp16 and float32, not {_name(call.dtype)}"
    if isinstance(call.mask, Tensor):
        return "it supports no mask tensor"
    if call.head_dim > 256:
        return f"it supports head dims up to 256, not {call.head_dim}"
    if call.tiles > FLEX_TILES:
        return f"its block mask would have {call.tiles} entries, more than {FLEX_TILES}"
    return None


def _any_refusal(call: Call) -> str | None:
    return None


def _triton() -> Backend:
    from longctx.kernels.attention import triton as attention_triton

    return attention_triton


def _flex() -> Backend:
    from longctx.kernels.attention.flex import Flex

    return Flex()


@dataclass(frozen=True)
class Entry:
    """A backend: why it does not support a call (None: it does), how to load it, and which calls it goes ahead for."""

    refusal: Callable[[Call], str | None]
    load: Callable[[], Backend]
    is_ahead: Callable[[Call], bool] = lambda call: False


BACKENDS = {
    "cpu-native": Entry(_cpu_native_refusal, native.Native),
    "cpu-flash": Entry(_cpu_flash_refusal, CpuFlash),
    "cuda-flash": Entry(_cuda_flash_refusal, CudaFlash),
    "flash-attn": Entry(_flash_attn_refusal, FlashAttn),
    "triton": Entry(_triton_refusal, _triton),
    "cuda-cudnn": Entry(_cudnn_refusal, CudaCudnn, _cudnn_is_faster),
    "flex": Entry(_flex_refusal, _flex),
    "tiled": Entry(_any_refusal, Tiled),
}
"""In order of preference. cuDNN and FlexAttention build a plan or compile a kernel for each new shape, and packed
documents have new shapes in every batch, so they come after those that do not."""


def by_preference(call: Call) -> list[str]:
    """Return the names of the backends, those that are ahead for this call first."""
    return sorted(BACKENDS, key=lambda name: not BACKENDS[name].is_ahead(call))


def explain_backends(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, backward: bool = False
) -> dict[str, str | None]:
    """Return for each backend why it does not support this call, None where it does; in order of preference."""
    call = describe(q, k, v, mask, backward=backward)
    return {name: BACKENDS[name].refusal(call) for name in by_preference(call)}


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, backend: str | None = None, *, backward: bool = False
) -> Backend:
    """Return the first backend that supports the call, forward or backward, or the named one.

    Both passes may be of different backends: each returns the block's own lse and takes the global one. Raises
    ValueError where the named one does not exist or does not support the call, with a list of those that do.
    """
    if backend is None:
        call = describe(q, k, v, mask, backward=backward)
        able = (BACKENDS[name] for name in by_preference(call) if BACKENDS[name].refusal(call) is None)
        return next(able).load()
    if backend not in BACKENDS:
        raise ValueError(f"attention: no backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    reasons = explain_backends(q, k, v, mask, backward=backward)
    if reasons[backend] is not None:
        others = ", ".join(name for name, reason in reasons.items() if reason is None)
        raise ValueError(
            f"attention: backend {backend!r} does not support this call: {reasons[backend]}. Supported by: {others}"
        )
    return BACKENDS[backend].load()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""RMSNorm, with an output gate or without, and SwiGLU: per-token operators that read and write memory once.

On a CPU float32 and bf16 run in C++ (`longctx.kernels.native_pointwise`). Without that, every elementwise operator on a
long sequence reads and writes main memory, and every temporary needs fresh pages from the system; tiles that stay in
cache avoid both (2.5 to 6 times faster than torch's operators: benchmarks/README.md). On CUDA one tile covers the whole
tensor, and `longctx.kernels.fusion` makes a kernel of it.
Computed in the accumulation dtype and cast once; only the inputs are saved for the backward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from longctx.kernels import native_pointwise as native
from longctx.kernels.autograd import exact_backward, exact_forward
from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.fusion import fused

TILE_ELEMENTS = 2**18
"""Elements per tile on a CPU: 1 MiB in float32, half of a core's L2 cache."""


def _tiles(x: Tensor) -> Iterator[slice]:
    """Split the rows of `x [R, D]` into tiles."""
    rows, width = x.shape
    step = max(1, TILE_ELEMENTS // max(width, 1)) if x.device.type == "cpu" else max(rows, 1)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, max(rows, 1), step))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _by_tiles(function: Callable[..., Any], rows: Sequence[Tensor], *fixed: Any) -> tuple[Tensor, ...]:
    """Call `function(*rows, *fixed)` on tiles of the `rows`, `[R, ...]` each, and put its results together.

    Results of two dimensions are rows; those of one are sums over rows.
    """
    tiles = list(_tiles(rows[0]))
    found: list[Tensor] = []
    for tile in tiles:
        parts = function(*(x[tile] for x in rows), *fixed)
        parts = parts if isinstance(parts, tuple) else (parts,)
        if len(tiles) == 1:
            return parts
        if not found:
            found = [x.new_empty(len(rows[0]), x.shape[1]) if x.dim() == 2 else torch.zeros_like(x) for x in parts]
        for whole, part in zip(found, parts, strict=True):
            if part.dim() == 2:
                whole[tile] = part
            else:
                whole += part
    return tuple(found)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[:, None]


Activation = Literal["silu", "sigmoid"]


def _normed(wide: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x / rms(x)` of each row, and `1 / rms(x)`, `[R, 1]`."""
    inverse = _row_dot(wide, wide).div_(wide.shape[1]).add_(eps).rsqrt_()
    return wide * inverse, inverse


def _norm_grad(dnormed: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of x for that of `x / rms(x)`; overwrites `normed`."""
    mean = _row_dot(dnormed, normed).div_(normed.shape[1])
    return (dnormed - normed.mul_(mean)).mul_(inverse)


def _activate(gate: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return the activation of a gate and its derivative."""
    sigmoid = torch.sigmoid(gate)
    if activation == "sigmoid":
        return sigmoid, sigmoid * (1 - sigmoid)
    silu = sigmoid * gate
    return silu, silu.addcmul(silu, sigmoid, value=-1).add_(sigmoid)


@fused
def _norm_rows(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows `[R, D]`, for a scale `[D]` or `[R, D]`."""
    normed, _ = _normed(x.to(accumulation_dtype(x.dtype)), eps)
    return normed.mul_(scale).to(x.dtype)


@fused
def _norm_rows_grad(x: Tensor, grad: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and that of a scale `[R, D]`, or of a scale `[D]` in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    normed, inverse = _normed(x.to(dtype), eps)
    wide = grad.to(dtype)
    dscale = wide * normed
    dscale = dscale.sum(dim=0) if scale.dim() == 1 else dscale.to(scale.dtype)
    return _norm_grad(wide * scale, normed, inverse).to(x.dtype), dscale


@fused
def _gated_norm_rows(x: Tensor, gate: Tensor, scale: Tensor, eps: float, activation: Activation) -> Tensor:
    """RMSNorm of rows `[R, D]` times a scale `[D]` times the activation of a gate `[R, D]`."""
    dtype = accumulation_dtype(x.dtype)
    normed, _ = _normed(x.to(dtype), eps)
    return normed.mul_(scale).mul_(_activate(gate.to(dtype), activation)[0]).to(x.dtype)


@fused
def _gated_norm_rows_grad(
    x: Tensor, gate: Tensor, grad: Tensor, scale: Tensor, eps: float, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the gate, and of the scale in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    normed, inverse = _normed(x.to(dtype), eps)
    wide = grad.to(dtype)
    activated, slope = _activate(gate.to(dtype), activation)
    dgate = (wide * normed).mul_(scale).mul_(slope).to(gate.dtype)
    wide = wide * activated
    dscale = (wide * normed).sum(dim=0)
    return _norm_grad(wide.mul_(scale), normed, inverse).to(x.dtype), dgate, dscale


@fused
def _swiglu_rows(gate_up: Tensor) -> Tensor:
    """SwiGLU of rows `[R, 2 F]`."""
    gate, up = gate_up.to(accumulation_dtype(gate_up.dtype)).chunk(2, dim=-1)
    return torch.sigmoid(gate).mul_(gate).mul_(up).to(gate_up.dtype)


@fused
def _swiglu_rows_grad(gate_up: Tensor, grad: Tensor) -> Tensor:
    dtype = accumulation_dtype(gate_up.dtype)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    wide = grad.to(dtype)
    sigmoid = torch.sigmoid(gate)
    silu = sigmoid * gate
    dup = (wide * silu).to(gate_up.dtype)
    # d silu(g) / dg = sigmoid(g) + silu(g) (1 - sigmoid(g))
    dgate = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid).mul_(up).mul_(wide).to(gate_up.dtype)
    return torch.cat([dgate, dup], dim=-1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        if native.is_supported(x, *([scale] if scale.dim() > 1 else [])):
            return native.norm(_rows(x), scale if scale.dim() == 1 else _rows(scale), eps).view(x.shape)
        if scale.dim() == 1:
            (out,) = _by_tiles(_norm_rows, (_rows(x),), scale, eps)
        else:
            (out,) = _by_tiles(_norm_rows, (_rows(x), _rows(scale)), eps)
        return out.view(x.shape)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        rows = _rows(x), _rows(grads[0])
        if native.is_supported(*rows, *([scale] if scale.dim() > 1 else [])):
            dx, dscale, _ = native.norm_grad(*rows, scale if scale.dim() == 1 else _rows(scale), ctx.eps)
        elif scale.dim() == 1:
            dx, dscale = _by_tiles(_norm_rows_grad, rows, scale, ctx.eps)
        else:
            dx, dscale = _by_tiles(_norm_rows_grad, (*rows, _rows(scale)), ctx.eps)
        return dx.view(x.shape), dscale.to(scale.dtype).view(scale.shape), None


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, x: Tensor, scale: Tensor, gate: Tensor, eps: float, activation: Activation) -> Tensor:
        ctx.save_for_backward(x, scale, gate)
        ctx.settings = eps, activation
        if native.is_supported(x, gate):
            return native.norm(_rows(x), scale, eps, _rows(gate), activation).view(x.shape)
        (out,) = _by_tiles(_gated_norm_rows, (_rows(x), _rows(gate)), scale, eps, activation)
        return out.view(x.shape)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, gate = ctx.saved_tensors
        rows = _rows(x), _rows(gate), _rows(grads[0])
        if native.is_supported(*rows):
            dx, dscale, dgate = native.norm_grad(rows[0], rows[2], scale, ctx.settings[0], rows[1], ctx.settings[1])
        else:
            dx, dgate, dscale = _by_tiles(_gated_norm_rows_grad, rows, scale, *ctx.settings)
        assert dgate is not None
        return dx.view(x.shape), dscale.to(scale.dtype), dgate.view(gate.shape), None, None


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute `x * rsqrt(mean(x^2) + eps) * scale` over the last dim (Zhang & Sennrich 2019), in x's dtype.

    Shapes: x `[..., D]`; scale `[D]` (a weight) or `[..., D]` like x (a gate).
    """
    if scale.shape != x.shape and scale.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: scale has shape {list(scale.shape)}: expected that of x, {list(x.shape)}, or [{x.shape[-1]}]"
        )
    return _RMSNorm.apply(x, scale, eps)  # type: ignore[no-untyped-call]


def gated_rms_norm(x: Tensor, scale: Tensor, gate: Tensor, eps: float, activation: Activation) -> Tensor:
    """Compute `rms_norm(x, scale, eps) * activation(gate)`, in x's dtype, rounded once.

    Shapes: x and gate `[..., D]`, scale `[D]`. The norm comes before the gate, as in RetNet (Sun et al. 2023, section
    2.2) and Gated DeltaNet (Yang et al. 2024); Mamba-2's gate comes before the norm.
    """
    if gate.shape != x.shape or scale.shape != x.shape[-1:]:
        raise ValueError(
            f"gated_rms_norm: gate has shape {list(gate.shape)} and scale {list(scale.shape)}: expected "
            f"{list(x.shape)}, that of x, and [{x.shape[-1]}]"
        )
    return _GatedRMSNorm.apply(x, scale, gate, eps, activation)  # type: ignore[no-untyped-call]


class _Swiglu(torch.autograd.Function):
    @staticmethod
    @exact_forward
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if native.is_supported(gate_up):
            return native.swiglu(_rows(gate_up)).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        (out,) = _by_tiles(_swiglu_rows, (_rows(gate_up),))
        return out.view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @exact_backward
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if native.is_supported(gate_up, grads[0]):
            return native.swiglu_grad(_rows(gate_up), _rows(grads[0])).view(gate_up.shape)
        (dgate_up,) = _by_tiles(_swiglu_rows_grad, (_rows(gate_up), _rows(grads[0])))
        return dgate_up.view(gate_up.shape)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute `SiLU(gate) * up` (Shazeer 2020), `[..., F]`, from `gate_up [..., 2 F]`, the gates in the first half."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dim of gate_up is gates and values: {gate_up.shape[-1]} has to be even")
    return _Swiglu.apply(gate_up)  # type: ignore[no-untyped-call]

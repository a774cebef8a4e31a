"""Argument checks of linear attention: each error names the argument, its value and what was expected."""

from collections.abc import Sequence
from itertools import pairwise
from operator import index

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from longctx.kernels.dtypes import accumulation_dtype
from longctx.kernels.linear.recurrence import Inputs, state_heads

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where q `[B, T, Hq, K]`, k `[B, T, Hk, K]`, v `[B, T, Hv, V]` do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {_shape(x)}: expected 4 dimensions, [batch, tokens, heads, head dim]")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: expected one of {', '.join(str(d) for d in DTYPES)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, but q is {q.dtype}: expected the same dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: expected the same device")
        if x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} has batch and tokens {list(x.shape[:2])}, but q has {list(q.shape[:2])}: expected the same"
            )
        if 0 in x.shape[2:]:
            raise ValueError(f"{name} has shape {_shape(x)}: expected at least one head and one channel")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head dim {k.shape[3]}, but q has {q.shape[3]}: expected the same")


def _check_gate(name: str, gate: Tensor, k: Tensor, dims: str) -> None:
    along = tuple(gate.shape[:2]) == tuple(k.shape[:2])
    if gate.dim() > 1 and not along:
        raise ValueError(f"{name} has shape {_shape(gate)}: expected {dims} with [B, T] = {list(k.shape[:2])}")
    if gate.shape[0 if gate.dim() == 1 else 2] == 0:
        raise ValueError(f"{name} has shape {_shape(gate)}: expected at least one head")
    if not gate.dtype.is_floating_point:
        raise ValueError(f"{name} is {gate.dtype}: expected a floating-point dtype")
    if gate.device != k.device:
        raise ValueError(f"{name} is on {gate.device}, but k is on {k.device}: expected the same device")


def check_decay(log_decay: Tensor, k: Tensor, *, constant: bool) -> None:
    """Raise ValueError where log_decay is not `[H]` (only if `constant`), `[B, T, H]` or `[B, T, H, K]`.

    Nor may it be positive, nor a constant one NaN; a token's NaN is left to `longctx.kernels.finite`. On a GPU that is
    asserted on the device, without a synchronization; there, decays per channel are read only in anomaly mode
    (`torch.autograd.set_detect_anomaly`), since the largest of them takes a pass over as many bytes as a recurrence
    reads of them.
    """
    dims = "[H], [B, T, H] or [B, T, H, K]" if constant else "[B, T, H] or [B, T, H, K]"
    if log_decay.dim() not in ((1, 3, 4) if constant else (3, 4)):
        raise ValueError(f"log_decay has shape {_shape(log_decay)}: expected {dims}")
    _check_gate("log_decay", log_decay, k, dims)
    if log_decay.dim() == 4 and log_decay.shape[3] != k.shape[3]:
        raise ValueError(f"log_decay has {log_decay.shape[3]} channels, but k has {k.shape[3]}: expected the same")
    if log_decay.numel() == 0 or isinstance(log_decay, FakeTensor):
        return
    on_cpu = log_decay.device.type == "cpu"
    if log_decay.dim() == 4 and not on_cpu and not torch.is_anomaly_enabled():
        return
    largest = log_decay.detach().amax()
    fits = largest <= 0 if log_decay.dim() == 1 else ~(largest > 0)
    if on_cpu and not torch.compiler.is_compiling():
        if not fits.item():
            raise ValueError(
                f"log_decay has the largest value {largest.item():g}: expected logarithms of decays, at most 0 "
                "(pass log(decay), not the decay)"
            )
    else:
        torch._assert_async(fits, "log_decay is positive or NaN: expected logarithms of decays, at most 0")


def check_beta(beta: Tensor, k: Tensor) -> None:
    """Raise ValueError where beta is not `[B, T, H]`."""
    if beta.dim() != 3:
        raise ValueError(f"beta has shape {_shape(beta)}: expected [B, T, H]")
    _check_gate("beta", beta, k, "[B, T, H]")


def check_heads(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]) -> None:
    """Raise ValueError where heads do not group; see `LinearRecurrence`."""
    heads = state_heads(k, v, tuple(gates.values()))
    counts = {"k": k.shape[2], "v": v.shape[2]}
    counts |= {name: g.shape[0] if g.dim() == 1 else g.shape[2] for name, g in gates.items()}
    for name, count in counts.items():
        if heads % count:
            raise ValueError(
                f"{name} has {count} heads: expected a divisor of {heads}, the most of {', '.join(counts)}"
            )
    if q.shape[2] % heads and heads % q.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads: expected a divisor or a multiple of {heads}, the most of {', '.join(counts)}"
        )


def check_state(name: str, state: Tensor, inputs: Inputs) -> None:
    """Raise ValueError where a state is not `[B, H, K, V]` in the accumulation dtype."""
    shape, k = list(inputs.state_shape), inputs.k
    if list(state.shape) != shape:
        raise ValueError(f"{name} has shape {_shape(state)}: expected [batch, heads, K, V] = {shape}")
    if state.dtype != accumulation_dtype(k.dtype):
        raise ValueError(f"{name} is {state.dtype}: expected {accumulation_dtype(k.dtype)} for {k.dtype} tokens")
    if state.device != k.device:
        raise ValueError(f"{name} is on {state.device}, but k is on {k.device}: expected the same device")


def checked_cu_seqlens(cu_seqlens: Sequence[int] | Tensor, length: int | None = None) -> tuple[int, ...]:
    """Return cu_seqlens as integers. Raises ValueError where they are not `0 = c_0 < c_1 < ... < c_N`, N at least 1.

    c_N has to be `length`, unless that is None.
    """
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    try:
        bounds = tuple(index(c) for c in values)
    except TypeError:
        raise ValueError(f"cu_seqlens begins {list(values)[:4]}: expected integers") from None
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens begins {list(bounds[:4])}: expected 0 and the end of at least one document")
    for begin, end in pairwise(bounds):
        if begin >= end:
            raise ValueError(f"cu_seqlens has {end} after {begin}: expected strictly increasing values")
    if length is not None and bounds[-1] != length:
        raise ValueError(f"cu_seqlens ends with {bounds[-1]}: expected the number of tokens, {length}")
    return bounds

"""Block attention: one block of queries against one block of keys, with the log-sum-exp that merges blocks.

    forward(q, k, v, mask, scale)                       -> out, lse
    backward(do, q, k, v, out, lse, mask, scale)        -> dq, dk, dv

The backward pass of a block takes the *global* out and lse, those of all blocks that a query saw; the gradients of
blocks then add up. Every schedule over blocks (longctx.parallel.attention) is written over these two functions.

Shapes: q `[B, Tq, H, K]`; k `[B, Tk, H_kv, K]` and v `[B, Tk, H_kv, V]`, out and do `[B, Tq, H, V]`, with H a multiple
of H_kv: query head h reads key head `h // (H / H_kv)`, and nothing is repeated in memory. lse is `[B, H, Tq]`, the
natural logarithm in the accumulation dtype, -inf where a query sees nothing.

Masks (longctx.kernels.attention.masks): `FULL`; `CAUSAL` (Tq = Tk, a query sees the keys up to its own place); a bool
tensor `[Tq, Tk]`, True where a query sees a key; `Positions`, a document mask at the places of queries and keys, for
sliding windows, packed documents, zigzag halves and queries gathered by head. `Positions` is computed in tiles,
skipping those that no query sees, and no tensor of Tq x Tk exists.

Backends (longctx.kernels.attention.backends): the first that supports a call computes it, unless one is named. On CPUs
our C++ kernel for float32 and bf16, else torch's flash operator, tile by tile of the mask; on CUDA torch's
FlashAttention or flash_attn for bf16 and fp16 without positions, our Triton kernel for the rest, then cuDNN,
FlexAttention, and torch operators, which support everything. On Hopper and later cuDNN comes first where lengths are
multiples of 1024 and there are no positions, backward only without `torch.use_deterministic_algorithms`. All return the
block's own lse and take the global one, so that the passes of a call may be of two backends; `explain_backends` lists
why each does not support a call.
"""

import torch
from torch import Tensor

from longctx.kernels.attention.backends import choose_backend, explain_backends
from longctx.kernels.attention.masks import (
    CAUSAL,
    CAUSAL_MASK,
    FULL,
    BlockMask,
    IntervalMask,
    Mask,
    PlainMask,
    Positions,
    packed_documents,
    sliding_window,
)
from longctx.kernels.attention.nonfinite import contained_backward, contained_forward
from longctx.kernels.attention.tiled import Gradients, merge_
from longctx.kernels.dtypes import accumulation_dtype

__all__ = [
    "CAUSAL",
    "CAUSAL_MASK",
    "FULL",
    "BlockMask",
    "IntervalMask",
    "Mask",
    "PlainMask",
    "Positions",
    "backward",
    "explain_backends",
    "forward",
    "merge_",
    "packed_documents",
    "sliding_window",
]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    (batch, queries, heads, key_dim), (kv_batch, keys, kv_heads, kv_dim) = q.shape, k.shape
    if (kv_batch, kv_dim) != (batch, key_dim) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected "
            "[B, Tq, H, K], [B, Tk, H_kv, K] and [B, Tk, H_kv, V]"
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; they must have one dtype")
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    if mask is CAUSAL and queries != keys:
        raise ValueError(
            f"attention: CAUSAL needs as many queries as keys, not {queries} and {keys}; use Positions instead"
        )
    if isinstance(mask, Tensor) and (mask.shape != (queries, keys) or mask.dtype != torch.bool):
        raise ValueError(f"attention: the mask must be bool {(queries, keys)}, not {mask.dtype} {tuple(mask.shape)}")
    if isinstance(mask, Positions):
        shapes = (queries,), (batch, heads, queries)
        if mask.query.shape not in shapes or len(mask.key) != keys:
            raise ValueError(
                f"attention: the mask has positions of {tuple(mask.query.shape)} queries and {len(mask.key)} keys, "
                f"but q and k have {shapes[0]} or {shapes[1]} queries and {keys} keys"
            )
    if isinstance(mask, (Tensor, Positions)):
        device = mask.device if isinstance(mask, Tensor) else mask.query.device
        if device != q.device:
            raise ValueError(f"attention: the mask is on {device}, but q is on {q.device}")


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute one block: out in q's dtype, lse in the accumulation dtype. Shapes in the module's docstring.

    Raises ValueError where shapes, dtypes, mask and device do not match, and where the named backend does not support
    the call.
    """
    _check(q, k, v, mask)
    implementation = choose_backend(q, k, v, mask, backend)
    dtype = accumulation_dtype(q.dtype)
    if q.shape[1] == 0 or k.shape[1] == 0:
        # The operators divide by the lengths.
        nothing = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)
        return q.new_zeros(*q.shape[:3], v.shape[3]), nothing
    out, lse = contained_forward(lambda q, k, v: implementation.forward(q, k, v, mask, float(scale)), q, k, v, mask)
    return out.to(q.dtype), lse.to(dtype)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: BlockMask,
    scale: float,
    backend: str | None = None,
) -> Gradients:
    """Return one block's contributions to dq, dk and dv, from the global out and lse of its queries.

    Raises ValueError as `forward` does.
    """
    _check(q, k, v, mask)
    implementation = choose_backend(q, k, v, mask, backend, backward=True)
    if q.shape[1] == 0 or k.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    do, out = do.to(q.dtype), out.to(q.dtype)

    def run(do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        return implementation.backward(do, q, k, v, out, lse, mask, float(scale))

    dq, dk, dv = contained_backward(run, do, q, k, v, out, lse, mask)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

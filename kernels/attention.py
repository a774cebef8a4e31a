"""Block attention: one block of queries against one block of keys, with the log-sum-exp that merges blocks.

    forward(q, k, v, mask, scale)                       -> out, lse
    backward(do, q, k, v, out, lse, mask, scale)        -> dq, dk, dv

The backward pass of a block takes the *global* out and lse, those of all blocks that a query saw; its gradients then
simply add up. A schedule over blocks (longctx.parallel.attention) is written once over these two functions.

Shapes: q, out, do `[B, Tq, H, D]`; k, v `[B, Tk, H_kv, D]` with H a multiple of H_kv: query head h reads key head
`h // (H / H_kv)`, and nothing is repeated in memory. lse is `[B, H, Tq]` in the accumulation dtype, -inf where a query
sees nothing. `mask` is `FULL`, `CAUSAL` (Tq = Tk, a query sees the keys up to its own place) or a bool tensor
`[Tq, Tk]`, True where a query sees a key.

Backends: the CPU flash operator of torch, always in float32 or float64 (in bf16 it compiles and keeps a kernel for each
new shape: packed documents of 700 different lengths took 1.2 GB that never came back); on CUDA torch's FlashAttention
for bf16 and fp16; elsewhere (float32 and float64 on CUDA, masks there) a tiled form in torch operators, exact and
slower. Each returns its true lse.
"""

from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from longctx.kernels.recurrence import accumulation_dtype


class Mask(Enum):
    """The masks that need no tensor."""

    FULL = "full"
    CAUSAL = "causal"


FULL, CAUSAL = Mask.FULL, Mask.CAUSAL
BlockMask = Mask | Tensor

TILE = 1024
"""Keys of a tile in the form that is written in torch operators."""


class _Backend(Protocol):
    """One key head for each query head, `[B, H, T, D]`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class _CpuFlash:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`, which gives its lse and takes the global one back."""

    @staticmethod
    def _bias(mask: BlockMask, dtype: torch.dtype) -> Tensor | None:
        if isinstance(mask, Mask):
            return None
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is CAUSAL, attn_mask=self._bias(mask, q.dtype), scale=scale
        )
        if isinstance(mask, Tensor):
            # The operator gives 0 for a query that sees nothing.
            lse = lse.masked_fill(~mask.any(dim=1), float("-inf"))
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, _finite(lse), 0.0, mask is CAUSAL, attn_mask=self._bias(mask, q.dtype), scale=scale
        )


class _CudaFlash:
    """`aten::_scaled_dot_product_flash_attention`: bf16 and fp16, no mask tensor."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, mask is CAUSAL, False, scale=scale)
        return result[0], result[1]

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, mask is CAUSAL, unused_seed, unused_seed,
            scale=scale,
        )  # fmt: skip


class _Tiled:
    """Torch operators, `TILE` keys at a time; scores and merges in the accumulation dtype."""

    @staticmethod
    def _scores(q: Tensor, k: Tensor, mask: BlockMask, begin: int, scale: float) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if mask is FULL:
            return scores
        if isinstance(mask, Tensor):
            visible = mask[:, begin : begin + k.shape[2]]
        else:
            queries = torch.arange(q.shape[2], device=q.device)
            visible = queries[:, None] >= torch.arange(begin, begin + k.shape[2], device=q.device)
        return scores.masked_fill_(~visible, float("-inf"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(q.dtype)
        out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
        queries = q.to(dtype)
        for begin in range(0, k.shape[2], TILE):
            keys, values = (x[:, :, begin : begin + TILE].to(dtype) for x in (k, v))
            scores = self._scores(queries, keys, mask, begin, scale)
            tile_lse = scores.logsumexp(dim=-1)
            weights = torch.exp(scores - _finite(tile_lse)[..., None])
            _merge_(out, lse, torch.matmul(weights, values), tile_lse)
        return out.to(q.dtype), lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(q.dtype)
        queries, grads = q.to(dtype), do.to(dtype)
        delta = (grads * out.to(dtype)).sum(dim=-1, keepdim=True)
        dq = torch.zeros_like(queries)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for begin in range(0, k.shape[2], TILE):
            tile = slice(begin, begin + TILE)
            keys, values = k[:, :, tile].to(dtype), v[:, :, tile].to(dtype)
            weights = torch.exp(self._scores(queries, keys, mask, begin, scale) - _finite(lse)[..., None])
            dv[:, :, tile] = torch.matmul(weights.transpose(-1, -2), grads).to(v.dtype)
            dscores = weights * (torch.matmul(grads, values.transpose(-1, -2)) - delta) * scale
            dk[:, :, tile] = torch.matmul(dscores.transpose(-1, -2), queries).to(k.dtype)
            dq += torch.matmul(dscores, keys)
        return dq.to(q.dtype), dk, dv


def _finite(lse: Tensor) -> Tensor:
    """Rows that see nothing have weights exp(-inf - 0) = 0, not exp(-inf + inf)."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def _backend(q: Tensor, mask: BlockMask) -> _Backend:
    if q.device.type == "cpu":
        return _CpuFlash()
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cuda" and half and isinstance(mask, Mask) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        return _CudaFlash()
    return _Tiled()


def _merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Take a block into `out [..., D]` and `lse [...]`, in place, in their dtype (the accumulation dtype)."""
    total = torch.logaddexp(lse, block_lse)
    kept = torch.exp(lse - _finite(total))[..., None]
    added = torch.exp(block_lse - _finite(total))[..., None]
    out.mul_(kept).add_(block_out * added)
    lse.copy_(total)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Take a block's result into a running one, in place: `out [B, T, H, D]`, `lse [B, H, T]`, accumulation dtype.

    A query that a block does not see at all (block_lse -inf) keeps what it had; one that no block saw stays 0 / -inf.
    """
    _merge_(out.transpose(1, 2), lse, block_out.transpose(1, 2), block_lse)


def _computed(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype in which the device computes attention."""
    if tensors[0].device.type == "cpu":
        return [x.to(accumulation_dtype(x.dtype)) for x in tensors]
    return list(tensors)


def _groups(q: Tensor, k: Tensor) -> int:
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    return heads // kv_heads


def forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """One block forward: out in q's dtype, lse in the accumulation dtype. Shapes in the module's docstring."""
    groups, backend = _groups(q, k), _backend(q, mask)
    if q.shape[1] == 0 or k.shape[1] == 0:
        # The operators divide by the lengths.
        nothing = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), device=q.device)
        return q.new_zeros(*q.shape[:3], v.shape[3]), nothing.to(accumulation_dtype(q.dtype))
    dtype = q.dtype
    q, k, v = _computed(q, k, v)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if groups == 1:
        out, lse = backend.forward(q.transpose(1, 2), keys, values, mask, scale)
        return out.transpose(1, 2).to(dtype), lse
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q.dtype), device=q.device)
    for group in range(groups):
        # The group-th query head of every key head: as many heads as k and v have, so nothing is repeated.
        part, lse[:, group::groups] = backend.forward(q[:, :, group::groups].transpose(1, 2), keys, values, mask, scale)
        out[:, :, group::groups] = part.transpose(1, 2)
    return out.to(dtype), lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One block backward, with the global out and lse of its queries: this block's share of dq, dk, dv."""
    groups, backend = _groups(q, k), _backend(q, mask)
    if q.shape[1] == 0 or k.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dtypes = q.dtype, k.dtype, v.dtype
    do, q, k, v, out = _computed(do, q, k, v, out)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = k.dtype if groups == 1 else accumulation_dtype(k.dtype)
    dk, dv = torch.zeros(k.shape, dtype=dtype, device=k.device), torch.zeros(v.shape, dtype=dtype, device=v.device)
    for group in range(groups):
        heads = (slice(None), slice(None), slice(group, None, groups))
        dq_part, dk_part, dv_part = backend.backward(
            do[heads].transpose(1, 2),
            q[heads].transpose(1, 2),
            keys,
            values,
            out[heads].transpose(1, 2),
            lse[:, group::groups].contiguous(),
            mask,
            scale,
        )
        dq[heads] = dq_part.transpose(1, 2)
        dk += dk_part.transpose(1, 2)
        dv += dv_part.transpose(1, 2)
    return dq.to(dtypes[0]), dk.to(dtypes[1]), dv.to(dtypes[2])

"""FlexAttention as a backend of block attention, with the global out and lse in its backward pass."""

import math
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longctx.kernels.attention.masks import PlainMask, Positions, key_bounds, query_bounds
from longctx.kernels.attention.tiled import Gradients, dense_rows, finite
from longctx.kernels.dtypes import accumulation_dtype


class FlexAttention(Protocol):
    """The function that Flex calls: flex_attention, compiled or not."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, scale: float, enable_gqa: bool, return_aux: Any
    ) -> tuple[Tensor, Any]: ...


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


class Flex:
    """FlexAttention: masks by position, as a mask function over the bounds and a block mask of the visible tiles.

    Its autograd uses only its own out and lse, but it accepts a gradient of the lse, and that is enough. With
    w = exp(lse - global lse) a query's global weights are w times the block's own, so the gradients of the global
    softmax follow from the block's own with dout' = w dout and dlse' = w dout . (out - global out). The forward pass of
    the block is recomputed for it.

    The block mask has (Tq / 128) x (Tk / 128) entries (times B x H where positions differ by head).
    """

    TILE = 128

    def __init__(self, attend: FlexAttention | None = None) -> None:
        self._attend = attend

    def _block_mask(self, mask: PlainMask | Positions, q: Tensor, k: Tensor) -> BlockMask:
        begin, end = key_bounds(mask, q.shape[1], k.shape[1], q.device)
        by_head = begin.dim() == 3
        first, last = query_bounds(begin, end, k.shape[1], self.TILE)
        tiles = torch.arange(math.ceil(q.shape[1] / self.TILE), dtype=first.dtype, device=q.device)[:, None]
        first, last = first[..., None, :], last[..., None, :]
        visible = (first < last) & (first < (tiles + 1) * self.TILE) & (last > tiles * self.TILE)
        visible = visible if by_head else visible[None, None]

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if by_head:
                return (j >= begin[b, h, i]) & (j < end[b, h, i])
            return (j >= begin[i]) & (j < end[i])

        return BlockMask.from_kv_blocks(
            visible.sum(dim=-1, dtype=torch.int32),
            visible.int().argsort(dim=-1, descending=True, stable=True).int(),
            BLOCK_SIZE=self.TILE,
            mask_mod=seen,
            seq_lengths=(q.shape[1], k.shape[1]),
        )

    def _block(self, q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
        attend = self._attend or _compiled()
        out, aux = attend(
            *(dense_rows(x.transpose(1, 2)) for x in (q, k, v)), block_mask=block_mask, scale=scale,
            enable_gqa=q.shape[2] != k.shape[2], return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        return out.transpose(1, 2), aux.lse

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: PlainMask | Positions, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse, shapes as in longctx.kernels.attention."""
        with torch.no_grad():
            return self._block(q, k, v, self._block_mask(mask, q, k), scale)

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: PlainMask | Positions,
        scale: float,
    ) -> Gradients:
        """Return dq, dk, dv, from the global out and lse."""
        own_q, own_k, own_v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            own_out, own_lse = self._block(own_q, own_k, own_v, self._block_mask(mask, q, k), scale)
        weight = torch.exp(own_lse.detach() - finite(lse))
        dtype = accumulation_dtype(do.dtype)
        gap = (do.to(dtype) * (own_out.detach().to(dtype) - out.to(dtype))).sum(dim=-1).transpose(1, 2)
        dout = (do.to(dtype) * weight.transpose(1, 2)[..., None]).to(do.dtype)
        dq, dk, dv = torch.autograd.grad([own_out, own_lse], leaves, [dout, weight * gap])
        return dq, dk, dv

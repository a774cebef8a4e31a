"""Vendor kernels for block attention: torch's flash and cuDNN operators and the package flash_attn, all below autograd.

Each returns the block's own lse and takes the global out and lse in the backward pass.
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from longctx.kernels.attention.masks import CAUSAL, PlainMask, TileMask
from longctx.kernels.attention.tiled import Gradients, HeadwiseBackend, dense_rows, finite
from longctx.kernels.dtypes import accumulation_dtype

_CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _flops_backward(do: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(do, q, k, v)


# torch counts its other attention operators in the same way, ignoring the mask.
for _operator, _formula in ((_CPU_FLASH, _flops), (_CPU_FLASH_BACKWARD, _flops_backward)):
    if _operator not in flop_registry:
        register_flop_formula(_operator)(_formula)


def padded(multiple: int, *tensors: Tensor) -> list[Tensor]:
    """Pad the last dims with zeros to one size, the largest rounded up to a multiple; dense.

    Zeros at the end of q and k do not change scores; those at the end of v and do add columns to cut off.
    """
    size = math.ceil(max(x.shape[-1] for x in tensors) / multiple) * multiple
    return [
        torch.nn.functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else dense_rows(x) for x in tensors
    ]


class PaddedOperator(HeadwiseBackend):
    """An operator that needs one head dim for q, k and v."""

    multiple = 8

    @abstractmethod
    def operator(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """Return out and lse."""

    @abstractmethod
    def operator_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """Return dq, dk, dv."""

    def block_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """See HeadwiseBackend."""
        q, k, value = padded(self.multiple, q, k, v)
        out, lse = self.operator(q, k, value, mask, scale)
        return out[..., : v.shape[3]], lse

    def block_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """See HeadwiseBackend."""
        do_, q_, k_, v_, out_ = padded(self.multiple, do, q, k, v, out)
        grads = self.operator_backward(do_, q_, k_, v_, out_, lse, mask, scale)
        dq, dk, dv = (grad[..., : x.shape[3]] for grad, x in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv


class CpuFlash(PaddedOperator):
    """`aten::_scaled_dot_product_flash_attention_for_cpu`, which returns its lse and takes the global one.

    Always in float32 or float64: in bf16 it compiles and keeps a kernel for each new shape (packed documents of 700
    different lengths took 1.2 GB that were never freed).
    """

    multiple = 1

    def operands(self, *tensors: Tensor) -> list[Tensor]:
        """See HeadwiseBackend."""
        return [x.to(accumulation_dtype(x.dtype)) for x in tensors]

    @staticmethod
    def _bias(mask: TileMask, dtype: torch.dtype) -> Tensor | None:
        if isinstance(mask, PlainMask):
            return None
        bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return bias if mask.dim() == 2 else bias[None]

    def operator(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """See PaddedOperator."""
        out, lse = _CPU_FLASH(q, k, v, 0.0, mask is CAUSAL, attn_mask=self._bias(mask, q.dtype), scale=scale)
        if isinstance(mask, Tensor):
            # The operator returns an lse of 0 for a query that sees nothing.
            lse = lse.masked_fill(~mask.any(dim=-1), float("-inf"))
        return out, lse

    def operator_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """See PaddedOperator."""
        return _CPU_FLASH_BACKWARD(
            do, q, k, v, out, finite(lse), 0.0, mask is CAUSAL, attn_mask=self._bias(mask, q.dtype), scale=scale
        )


class CudaFlash(PaddedOperator):
    """`aten::_scaled_dot_product_flash_attention`: bf16 and fp16, no mask tensor."""

    def operator(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """See PaddedOperator."""
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, mask is CAUSAL, False, scale=scale)
        return result[0], result[1]

    def operator_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """See PaddedOperator."""
        unused_seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, mask is CAUSAL, unused_seed, unused_seed,
            scale=scale,
        )  # fmt: skip


class CudaCudnn(PaddedOperator):
    """`aten::_scaled_dot_product_cudnn_attention`: bf16 and fp16, no mask tensor. Builds a plan per new shape.

    Its backward pass does not repeat bitwise, even with `torch.use_deterministic_algorithms` (torch 2.11, cuDNN 9.19,
    an H100, from 5,000 tokens on).
    """

    def operator(self, q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float) -> tuple[Tensor, Tensor]:
        """See PaddedOperator."""
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, mask is CAUSAL, False, scale=scale
        )
        return result[0], result[1].reshape(q.shape[:3])

    def operator_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: TileMask, scale: float
    ) -> Gradients:
        """See PaddedOperator."""
        unused_seed = torch.zeros((), dtype=torch.int64, device=q.device)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            do.contiguous(), q, k, v, out.contiguous(), lse.contiguous()[..., None], unused_seed, unused_seed, None,
            None, None, q.shape[2], k.shape[2], 0.0, mask is CAUSAL, scale=scale,
        )  # fmt: skip


class FlashAttn:
    """The package flash_attn (Dao 2023), 2.7 or a later 2.x: bf16 and fp16, no mask tensor; grouped heads natively."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: PlainMask, scale: float) -> tuple[Tensor, Tensor]:
        """Return out and lse, shapes as in longctx.kernels.attention."""
        from flash_attn import flash_attn_func

        q, k, value = padded(8, q, k, v)
        out, lse, _ = flash_attn_func(
            q, k, value, softmax_scale=scale, causal=mask is CAUSAL, return_attn_probs=True
        )  # fmt: skip
        return out[..., : v.shape[3]], lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: PlainMask, scale: float
    ) -> Gradients:
        """Return dq, dk, dv. Below the package's autograd function, which takes no global out and lse."""
        from flash_attn.flash_attn_interface import _flash_attn_backward

        do_, q_, k_, v_, out_ = padded(8, do, q, k, v, out)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_, k_, v_))
        _flash_attn_backward(
            dout=do_, q=q_, k=k_, v=v_, out=out_, softmax_lse=lse.contiguous(), dq=dq, dk=dk, dv=dv, dropout_p=0.0,
            softmax_scale=scale, causal=mask is CAUSAL, window_size_left=-1, window_size_right=-1, softcap=0.0,
            alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]

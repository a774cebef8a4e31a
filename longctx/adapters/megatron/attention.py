"""Softmax attention over context-parallel ranks as Megatron's `core_attention`, by every schedule.

In the place of TransformerEngine's, which is the only one of Megatron's own that takes context parallelism. The
projections, norms and rotary positions around it stay Megatron's. The schedule is `cp_comm_type`: Megatron's names
(`p2p` is the ring, `a2a` Ulysses, `a2a+p2p` both) or one of `longctx.parallel.attention.SCHEDULES`; where it says
nothing, `auto`. Tensor parallelism needs nothing here: a rank's heads attend by themselves.
"""

import math
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from longctx.adapters.megatron.layouts import Groups, Placement, attention_schedule, placed
from longctx.adapters.megatron.router import Attend
from longctx.kernels.attention import block as blocks
from longctx.kernels.attention.block import FULL, BlockMask, Positions
from longctx.moe.token_graph import attention_aware
from longctx.parallel.attention.api import softmax_attention

CAUSAL_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SoftmaxAttention(MegatronModule):  # type: ignore[misc]
    """`core_attention` of a `SelfAttentionSubmodules`; without parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **newer: Any,
    ) -> None:
        """As Megatron calls it. `layer_number` counts from 1, over all pipeline stages.

        Raises ValueError for what is not computed here: dropout of weights, softmax with an offset, cross-attention,
        windows that reach ahead.
        """
        del newer  # names for profilers and the like
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout: {dropout}; attention over ranks has none, set --attention-dropout 0")
        if attention_type != "self":
            raise ValueError(f"attention_type: {attention_type!r}; only self-attention lies over ranks as one sequence")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(f"softmax_type: {config.softmax_type!r}; only 'vanilla' is computed here")
        self.attn_mask_type = attn_mask_type
        self.groups = Groups.of(config, pg_collection)
        self.schedule = attention_schedule(cp_comm_type)
        if self.schedule.startswith("ulysses-") and self.groups.cp.size > 1 and self.groups.grid is None:
            raise ValueError(
                f"cp_comm_type: {cp_comm_type!r} needs two hierarchical_context_parallel_sizes, the first that of the "
                "Ulysses groups"
            )
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.window = window_of(config, layer_number)
        self.lends = False
        """Whether the layer's router reads the attention once more."""
        self.attend: Attend | None = None
        """What it then reads, of the batch that was computed last."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query `[s/cp, b, h/tp, d]`, key and value with `groups/tp` heads, to `[s/cp, b, h/tp * d]`; packed
        `[t/cp, h/tp, d]` to `[t/cp, h/tp * d]`. Positions (rotary) are already applied.

        Raises ValueError for a mask that is not the plain causal one: documents are told by `packed_seq_params`.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias: attention over ranks takes none")
        kind = attn_mask_type or self.attn_mask_type
        causal = kind in CAUSAL_TYPES
        if not causal and kind is not AttnMaskType.no_mask:
            raise ValueError(f"attn_mask_type: {kind.name}; only causal attention, and no_mask, lie over ranks here")
        if packed_seq_params is not None:
            where = placed(len(query), packed_seq_params, self.groups, self.schedule)
            return self._over_ranks(query[None], key[None], value[None], where, causal)[0].flatten(1)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if k.shape[1] != q.shape[1]:
            return self._generated(q, k, v).flatten(2).transpose(0, 1)
        where = placed(q.shape[1], None, self.groups, self.schedule)
        if causal and attention_mask is not None:
            check_causal(attention_mask, where)
        return self._over_ranks(q, k, v, where, causal).flatten(2).transpose(0, 1).contiguous()

    def _over_ranks(self, q: Tensor, k: Tensor, v: Tensor, where: Placement, causal: bool) -> Tensor:
        q, k, v = where.taken(q, k, v)
        if self.lends:
            self.attend = partial(self._attend, q, k, where)
        out = softmax_attention(q, k, v, where.layout, self.softmax_scale, causal=causal, window=self.window)
        return where.given(out)

    def _attend(self, q: Tensor, k: Tensor, where: Placement, r: Tensor) -> Tensor:
        """The attention of these queries to these keys, the mean of the rank's heads, of scores `[b, s/cp, E]`."""
        (r,) = where.taken(r)
        return where.given(attention_aware(r, q, k, where.layout, self.softmax_scale, self.window))

    def _generated(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The newest queries against all keys that Megatron's inference context has."""
        if self.groups.cp.size > 1 or torch.is_grad_enabled():
            raise ValueError(
                f"attention: {q.shape[1]} queries and {k.shape[1]} keys; generation runs without gradients on one "
                f"context-parallel rank, not on {self.groups.cp.size}"
            )
        mask: BlockMask = FULL
        if q.shape[1] > 1 or self.window is not None:
            places = torch.arange(k.shape[1], device=q.device)
            mask = Positions(places[-q.shape[1] :], places, window=self.window)
        out, _ = blocks.forward(q, k, v, mask, self.softmax_scale)
        return out


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """The tokens that a query of a layer sees, itself included; None for all earlier ones.

    Raises ValueError for a window that reaches ahead.
    """
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    before, ahead = config.window_size
    if ahead > 0:
        raise ValueError(f"window_size: {config.window_size} reaches {ahead} tokens ahead; the second has to be 0")
    return None if before < 0 else before + 1


def check_causal(mask: Tensor, where: Placement) -> None:
    """Raise ValueError where a mask `[.., .., s/cp, s]` (True: not seen) is not the causal one; each is looked at once.

    Megatron's loader makes it, of the square of the sequence, unless told not to.
    """
    if getattr(mask, "_longctx_checked", False) or mask.dtype != torch.bool:
        return
    places = where.layout.tokens.to(mask.device)
    if mask.shape[-2:] != (len(places), where.layout.length) or bool(
        (mask != (torch.arange(where.layout.length, device=mask.device) > places[:, None])).any()
    ):
        raise ValueError(
            f"attention_mask: {tuple(mask.shape)} is not the causal mask; give documents as packed sequences "
            "(packed_seq_params), and run with --no-create-attention-mask-in-dataloader and without "
            "--reset-attention-mask"
        )
    mask._longctx_checked = True  # type: ignore[attr-defined]

"""Softmax attention as Megatron's `core_attention`: context parallelism with every schedule, without TransformerEngine.

Of Megatron's own core attentions only TransformerEngine's supports context parallelism. The projections, norms and
rotary positions around it remain Megatron's. `cp_comm_type` selects the schedule: Megatron's names (`p2p` is the ring,
`a2a` Ulysses, `a2a+p2p` both) or one of `longctx.parallel.attention.SCHEDULES`; default `auto`. Tensor parallelism
needs no code here: each rank computes its own heads.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from longctx.adapters.megatron.layouts import BatchLayout, Groups, attention_schedule, batch_layout
from longctx.adapters.megatron.router import AttentionAverage
from longctx.kernels.attention import block as blocks
from longctx.kernels.attention.block import FULL, BlockMask, IntervalMask, Positions
from longctx.moe.token_graph import attention_aware
from longctx.parallel.attention.api import softmax_attention

CAUSAL_TYPES = (AttnMaskType.causal, AttnMaskType.padding_causal)


class SoftmaxAttention(MegatronModule):  # type: ignore[misc]
    """`core_attention` of `SelfAttentionSubmodules`; no parameters."""

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
        """Megatron's signature. `layer_number` counts from 1, over all pipeline stages.

        Raises ValueError for unsupported options: attention dropout, softmax with an offset, cross-attention, windows
        over later tokens.
        """
        del newer  # arguments of newer versions, such as names for profilers
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(f"attention_dropout is {dropout}: not supported, set --attention-dropout 0")
        if attention_type != "self":
            raise ValueError(f"attention_type is {attention_type!r}: only self-attention is supported")
        if getattr(config, "softmax_type", "vanilla") != "vanilla":
            raise ValueError(f"softmax_type is {config.softmax_type!r}: only 'vanilla' is supported")
        self.attn_mask_type = attn_mask_type
        self.groups = Groups.from_collection(config, pg_collection)
        self.schedule = attention_schedule(cp_comm_type)
        if self.schedule.startswith("ulysses-") and self.groups.cp.size > 1 and self.groups.grid is None:
            raise ValueError(
                f"cp_comm_type {cp_comm_type!r} needs two hierarchical_context_parallel_sizes, the first for the "
                "Ulysses groups"
            )
        self.softmax_scale = 1 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.mask = mask_of(config, layer_number)
        self.serves_router = False
        """Whether the layer's router averages its scores by this attention."""
        self.attention_average: AttentionAverage | None = None
        """The average by the attention of the latest batch, if it serves a router."""

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
        """Compute attention of query `[s/cp, b, h/tp, d]`, key and value with `groups/tp` heads, `[s/cp, b, h/tp * d]`;
        packed (THD) of `[t/cp, h/tp, d]`, `[t/cp, h/tp * d]`. Rotary positions are already applied.

        Raises ValueError for a mask other than the causal one: packed documents need `packed_seq_params`.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias: not supported")
        kind = attn_mask_type or self.attn_mask_type
        causal = kind in CAUSAL_TYPES
        if not causal and kind is not AttnMaskType.no_mask:
            raise ValueError(f"attn_mask_type is {kind.name}: only causal, padding_causal and no_mask are supported")
        mask = self.mask if causal else replace(self.mask, causal=False)
        if packed_seq_params is not None:
            batch = batch_layout(len(query), packed_seq_params, self.groups, self.schedule)
            return self._over_ranks(query[None], key[None], value[None], batch, mask)[0].flatten(1)
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if k.shape[1] != q.shape[1]:
            return self._decode(q, k, v).flatten(2).transpose(0, 1)
        batch = batch_layout(q.shape[1], None, self.groups, self.schedule)
        if causal and attention_mask is not None:
            check_causal(attention_mask, batch)
        return self._over_ranks(q, k, v, batch, mask).flatten(2).transpose(0, 1).contiguous()

    def _over_ranks(self, q: Tensor, k: Tensor, v: Tensor, batch: BatchLayout, mask: IntervalMask) -> Tensor:
        q, k, v = batch.to_layout(q, k, v)
        if self.serves_router:
            self.attention_average = partial(self._average, q, k, batch)
        out = softmax_attention(q, k, v, batch.layout, self.softmax_scale, mask=mask)
        return batch.to_megatron(out)

    def _average(self, q: Tensor, k: Tensor, batch: BatchLayout, scores: Tensor) -> Tensor:
        """Average scores `[b, s/cp, E]` by the attention of q to k, the mean over this rank's heads."""
        (scores,) = batch.to_layout(scores)
        return batch.to_megatron(attention_aware(scores, q, k, batch.layout, self.softmax_scale, self.mask))

    def _decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from the newest queries to all keys of Megatron's KV cache."""
        if self.groups.cp.size > 1 or torch.is_grad_enabled():
            raise ValueError(
                f"attention: {q.shape[1]} queries and {k.shape[1]} keys: decoding runs without gradients on one "
                f"context-parallel rank, not on {self.groups.cp.size}"
            )
        mask: BlockMask = FULL
        earlier = k.shape[1] - 1
        if q.shape[1] > 1 or self.mask.cached_keys(earlier) < earlier:
            places = torch.arange(k.shape[1], device=q.device)
            mask = Positions(places[-q.shape[1] :], places, mask=self.mask)
        out, _ = blocks.forward(q, k, v, mask, self.softmax_scale)
        return out


def mask_of(config: TransformerConfig, layer_number: int) -> IntervalMask:
    """Return the causal mask of a layer, with its sliding window where it has one.

    Raises ValueError for a window over later tokens.
    """
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return IntervalMask()
    before, ahead = config.window_size
    if ahead > 0:
        raise ValueError(f"window_size is {config.window_size}: the second number has to be 0, no later tokens")
    return IntervalMask(window=None if before < 0 else before + 1)


def check_causal(mask: Tensor, batch: BatchLayout) -> None:
    """Raise ValueError if a mask `[.., .., s/cp, s]` (True: masked) is not the causal one; each mask is checked once.

    Megatron's data loader creates it, quadratic in the sequence, by default.
    """
    if getattr(mask, "_longctx_checked", False) or mask.dtype != torch.bool:
        return
    tokens, length = batch.layout.tokens.to(mask.device), batch.layout.length
    if mask.shape[-2:] != (len(tokens), length) or bool(
        (mask != (torch.arange(length, device=mask.device) > tokens[:, None])).any()
    ):
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)} is not the causal mask: use packed sequences "
            "(packed_seq_params) for documents, --no-create-attention-mask-in-dataloader, and no --reset-attention-mask"
        )
    mask._longctx_checked = True  # type: ignore[attr-defined]

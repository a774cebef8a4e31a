"""Softmax attention over ranks, registered in transformers' `AttentionInterface` under the name `longctx`.

A model's own attention module computes projections, norms and rotary positions, and calls this function through
`config._attn_implementation`. The batch's layout is passed through the keyword arguments that models forward to their
layers, so that a layer recomputed under activation checkpointing gets the layout of its own batch.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from longctx.kernels.attention.block import IntervalMask
from longctx.parallel.attention.api import softmax_attention
from longctx.parallel.layout import Layout

NAME = "longctx"
LAYOUT = "longctx_layout"
"""Name of the keyword argument with the layout."""


def layout_of(arguments: dict[str, Any], module: nn.Module) -> Layout:
    """Return the layout from a layer's keyword arguments.

    Raises ValueError if there is none: the model was not called through its own forward.
    """
    layout: Layout | None = arguments.get(LAYOUT)
    if layout is None:
        raise ValueError(
            f"{type(module).__name__}: there is no layout; call the model that parallelize() returned, not a submodule"
        )
    return layout


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Compute attention over ranks, `[B, T_local, H, V]`.

    query `[B, H, T_local, K]`, key and value with H_kv heads, rotary positions applied. Raises ValueError for attention
    dropout, softcapping, sinks and attention that is not causal.
    """
    del attention_mask  # the layout defines the document mask
    layout = layout_of(arguments, module)
    unsupported = [name for name in ("softcap", "s_aux") if arguments.get(name) is not None]
    unsupported += ["dropout"] if dropout else []
    unsupported += ["is_causal"] if not getattr(module, "is_causal", True) else []
    if unsupported:
        raise ValueError(f"{type(module).__name__}: {', '.join(unsupported)}: not supported over ranks")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return softmax_attention(q, k, v, layout, scale, mask=IntervalMask(window=sliding_window)), None


AttentionInterface.register(NAME, attention)

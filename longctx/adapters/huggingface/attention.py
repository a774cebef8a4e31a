"""Softmax attention over ranks in the registry of transformers, under a name of our own.

A model's own attention module projects, norms and turns; what it calls by `config._attn_implementation` is this. The
layout of the batch comes with the call, through the keyword arguments that models pass from their forward to their
layers, so that a layer that is computed again in the backward pass has the one of its own batch.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from longctx.parallel.attention.api import softmax_attention
from longctx.parallel.layout import Layout

NAME = "longctx"
LAYOUT = "longctx_layout"
"""The keyword argument that carries the layout."""


def layout_of(arguments: dict[str, Any], module: nn.Module) -> Layout:
    """The layout among a layer's keyword arguments.

    Raises ValueError where there is none: the model was not called by its own forward.
    """
    layout: Layout | None = arguments.get(LAYOUT)
    if layout is None:
        raise ValueError(
            f"{type(module).__name__}: there is no layout; call the model that parallelize() gave, not a part of it"
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
    """query `[B, H, T_local, K]`, key and value with H_kv heads, positions applied: `[B, T_local, H, V]`.

    Raises ValueError for dropout of weights, caps of scores, sinks and attention that is not causal.
    """
    del attention_mask  # the layout says what is seen
    layout = layout_of(arguments, module)
    strange = [name for name in ("softcap", "s_aux") if arguments.get(name) is not None]
    strange += ["dropout"] if dropout else []
    strange += ["is_causal"] if not getattr(module, "is_causal", True) else []
    if strange:
        raise ValueError(f"{type(module).__name__}: {', '.join(strange)}: not computed over ranks")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return softmax_attention(q, k, v, layout, scale, window=sliding_window), None


AttentionInterface.register(NAME, attention)

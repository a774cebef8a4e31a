"""`parallelize`: exact sequence parallelism for transformers models, hybrids and packed documents included.

Every context-parallel rank passes the same whole sequences, and the model computes its own shard of them. Only models
whose token mixers are known (`MODELS`) are accepted: in others a layer that mixes tokens would silently see only the
tokens of its own rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from longctx.adapters.huggingface.attention import LAYOUT, NAME
from longctx.adapters.huggingface.linear import forward_over_ranks
from longctx.kernels.loss import IGNORE, linear_cross_entropy
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout, Order
from longctx.parallel.mesh import Axis, Mesh

SOFTMAX = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
HYBRID = ("minimax", "qwen3_next", "mamba2")
MODELS = (*SOFTMAX, *HYBRID)
"""Supported `config.model_type`."""
SOFTMAX_LAYERS, LINEAR_LAYERS = {"full_attention", "sliding_attention"}, {"linear_attention", "mamba"}
"""Supported entries of `config.layer_types`."""


@dataclass
class SequenceOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """Output of a parallelized model: the `loss` of all tokens, or without labels local `logits` `[B, T_local, N]`."""

    layout: Layout | None = None
    """The layout of the tokens over ranks; `layout.unshard` joins the shards of all ranks."""


@dataclass(frozen=True)
class _Plan:
    """The arguments of `parallelize`."""

    mesh: Mesh
    order: Order
    attention: str
    states: str
    loss_tile: int
    mean_over_ranks: bool

    def layout(self, bounds: tuple[int, ...]) -> Layout:
        return Layout.on(self.mesh, bounds, self.order, attention=self.attention, states=self.states)


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    order: Order = "zigzag",
    attention: str = "auto",
    states: str = "all-gather",
    loss_tile: int = 1024,
    gradients: Literal["mean", "sum"] = "mean",
) -> nn.Module:
    """Patch a model to compute each sequence over the ranks of `mesh.cp`, and return it.

    Call the model with whole sequences, the same on every rank of cp: `input_ids` `[B, T]`, `labels` `[B, T]` (not
    shifted, as everywhere in transformers), and for packed documents `position_ids` `[B, T]` that restart at 0 at each
    document, the same in all rows; documents do not attend to each other. T may have any length. The loss is the mean
    over all labels of the sequences, or their sum over `num_items_in_batch`, in tiles of `loss_tile` tokens, equal on
    every rank. `gradients`: how the cp ranks' gradients are reduced to those of one rank, "mean" (FSDP2's and DDP's
    default) or "sum".

    `order`, `attention` and `states` as in `longctx.parallel.layout.Layout`. Parameters keep their names; apply FSDP2
    or DDP before or after. Raises ValueError for a model with unsupported layers or options.
    """
    hf_model: Any = model
    linear = _count_linear_layers(hf_model)
    if hf_model.config.model_type != "mamba2":
        hf_model.set_attn_implementation(NAME)
    forwards = {module: forward for module in model.modules() if (forward := forward_over_ranks(module)) is not None}
    if len(forwards) != linear:
        raise ValueError(f"parallelize: {len(forwards)} of {linear} linear layers have a supported module")
    for module, forward in forwards.items():
        module.forward = MethodType(forward, module)
    head = hf_model.get_output_embeddings()
    head.forward = MethodType(_head, head)
    plan = _Plan(mesh, order, attention, states, loss_tile, gradients == "mean")
    model.forward = MethodType(partial(_forward, plan), model)
    return model


def _count_linear_layers(model: Any) -> int:
    """Count the linear layers of a model. Raises ValueError if it has unsupported layers or options."""
    name = type(model).__name__
    if not any(kind.__module__.startswith("transformers.models.") for kind in type(model).__mro__):
        raise ValueError(f"parallelize: {name} is not a class of transformers.models")
    kind, layers = model.config.model_type, getattr(model.config, "layer_types", None) or ()
    if kind not in MODELS:
        raise ValueError(f"parallelize: model_type {kind!r} is not supported; supported are {', '.join(MODELS)}")
    unsupported = sorted(set(layers) - SOFTMAX_LAYERS - LINEAR_LAYERS)
    if unsupported:
        raise ValueError(f"parallelize: {kind!r}: layer_types {', '.join(unsupported)} are not supported")
    for key, reason in _inexact_options(model.config):
        raise ValueError(f"parallelize: {kind!r}: {key}: {reason}")
    head = model.get_output_embeddings()
    if head is None or head.bias is not None:
        raise ValueError(f"parallelize: {name}: expected a causal language model whose head has no bias")
    return sum(layer in LINEAR_LAYERS for layer in layers)


def _inexact_options(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the config keys with which ranks would not compute what one rank does, and the reasons."""
    if getattr(config, "output_router_logits", False):
        yield "output_router_logits", "the auxiliary loss would cover only one rank's tokens; set it to false"
    if getattr(config, "is_causal", None) is False:
        yield "is_causal", "only causal attention is supported"
    if getattr(config, "router_jitter_noise", 0):
        yield "router_jitter_noise", "every rank would draw different noise; set it to 0"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            reason = (
                f"rope_type {parameters['rope_type']!r} depends on the sequence length, and a rank has only a shard"
            )
            yield "rope_parameters", reason


def _head(
    head: Any, x: Tensor, labels: Tensor | None = None, tile: int = 0, scale: float = 1.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Forward of the head: logits of `x [B, T, D]`, or with labels `[B, T]` the tiled cross-entropy times `scale`.

    Runs in the head's own forward, so that FSDP2 or ZeRO 3 gather its weight and reduce its gradient.
    """
    weight = head.weight
    if labels is None:
        return F.linear(x.to(weight.dtype), weight)
    return linear_cross_entropy(x.to(weight.dtype).flatten(0, 1), weight, labels.flatten(), tile, scale)


def _forward(
    plan: _Plan,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **arguments: Any,
) -> SequenceOutput:
    if arguments.pop("return_dict", None) is False:
        raise ValueError("return_dict is False: only dictionary outputs are supported")
    unsupported = [name for name, value in arguments.items() if value is not None and value is not False]
    if unsupported:
        raise ValueError(f"{', '.join(unsupported)}: not supported over ranks")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: expected a padding mask, {list(input_ids.shape)}; "
            "mark packed documents by position_ids that restart at 0"
        )
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError("attention_mask: masks tokens before others; padding has to be at the end")
    layout = plan.layout(document_bounds(input_ids, position_ids))
    if position_ids is None:
        position_ids = torch.arange(layout.length, device=input_ids.device)[None].expand_as(input_ids)
    positions = {} if model.config.model_type == "mamba2" else {"position_ids": layout.shard(position_ids)}
    hidden = model.base_model(
        input_ids=layout.shard(input_ids), use_cache=False, **positions, **{LAYOUT: layout}
    )[0]  # fmt: skip
    head = model.get_output_embeddings()
    if labels is None:
        return SequenceOutput(logits=head(hidden), layout=layout)
    shifted = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], dim=1)
    count = (shifted != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    # A Python float: mixed precision would round a tensor.
    share, _ = head(hidden, layout.shard(shifted, fill=IGNORE), plan.loss_tile, 1 / float(count))
    factor = float(plan.mesh.cp.size) if plan.mean_over_ranks else 1.0
    loss = _SumOverRanks.apply(share, plan.mesh.cp, factor)  # type: ignore[no-untyped-call]
    return SequenceOutput(loss=loss, layout=layout)


class _SumOverRanks(torch.autograd.Function):
    """Sums the ranks' shares of a loss; the gradient of each share is that of the sum times `factor`."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, axis: Axis, factor: float) -> Tensor:
        ctx.factor = factor
        return share.clone() if axis.group is None else all_reduce(share.clone(), axis.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None, None


def document_bounds(input_ids: Tensor, position_ids: Tensor | None) -> tuple[int, ...]:
    """Return the `cu_seqlens` of sequences `[B, T]` from position ids that restart at 0 at each document.

    Synchronises with the device. Raises ValueError if the rows are packed differently.
    """
    length = input_ids.shape[1]
    if position_ids is None:
        return 0, length
    rows = position_ids.expand_as(input_ids)
    if not bool((rows == rows[:1]).all()):
        raise ValueError("position_ids: the rows of a batch are packed differently; pack them into one row")
    starts = (rows[0] == 0).nonzero()[:, 0].tolist()
    return tuple(dict.fromkeys([0, *starts, length]))

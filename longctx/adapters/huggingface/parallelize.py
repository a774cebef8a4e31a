"""Exact sequence parallelism for a model of transformers: softmax layers, linear layers, packed documents, loss.

Every context-parallel rank is given the same whole sequences, and the model it gets back keeps its own part of them.
Which models: those whose token mixers are known (`MODELS`). Others are refused, since a layer that mixes tokens by
itself would silently see those of its own rank alone.
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
from longctx.adapters.huggingface.linear import replacement
from longctx.kernels.loss import IGNORE, linear_cross_entropy
from longctx.parallel.collectives import all_reduce
from longctx.parallel.layout import Layout, Order
from longctx.parallel.mesh import Axis, Mesh

SOFTMAX = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
HYBRID = ("minimax", "qwen3_next", "mamba2")
MODELS = (*SOFTMAX, *HYBRID)
"""`config.model_type` of the models whose token mixers are known."""
SOFTMAX_LAYERS, LINEAR_LAYERS = {"full_attention", "sliding_attention"}, {"linear_attention", "mamba"}
"""What `config.layer_types` may say."""


@dataclass
class SequenceOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """What a causal model gives, of this rank's tokens: `loss` is that of all, `logits` `[B, T_local, N]` only where
    there are no labels."""

    layout: Layout | None = None
    """Where this rank's tokens stand; `layout.unshard` puts the parts of all ranks together."""


@dataclass(frozen=True)
class _Plan:
    """How the model is split."""

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
    """The model itself, which from now on computes each sequence on the ranks of `mesh.cp` together.

    Call it with whole sequences, the same on every rank of cp: `input_ids` `[B, T]`, `labels` `[B, T]` (not shifted, as
    everywhere in transformers), and `position_ids` `[B, T]` that begin anew at 0 with each packed document, all rows
    alike; documents then do not see each other. T of any length. The loss is the mean over all labels of the sequences,
    or their sum over `num_items_in_batch`, in tiles of `loss_tile` tokens, and the same number on every rank. Its
    gradients are such that the `gradients` of all ranks of cp, their mean (FSDP2's and DDP's default) or their sum, are
    those of one rank.

    `order`, `attention` and `states` as in `longctx.parallel.layout.Layout`. Weights keep their names and their places;
    wrap it with FSDP2 or DDP before or after. Raises ValueError for a model whose layers are not all known.
    """
    theirs: Any = model
    linear = _linear_layers(theirs)
    if theirs.config.model_type != "mamba2":
        theirs.set_attn_implementation(NAME)
    forwards = {module: forward for module in model.modules() if (forward := replacement(module)) is not None}
    if len(forwards) != linear:
        raise ValueError(f"parallelize: of {linear} linear layers {len(forwards)} have modules that are known here")
    for module, forward in forwards.items():
        module.forward = MethodType(forward, module)
    head = theirs.get_output_embeddings()
    head.forward = MethodType(_head, head)
    plan = _Plan(mesh, order, attention, states, loss_tile, gradients == "mean")
    model.forward = MethodType(partial(_forward, plan), model)
    return model


def _linear_layers(model: Any) -> int:
    """How many linear layers a model has. Raises ValueError where some of its layers are not known here."""
    name = type(model).__name__
    if not any(each.__module__.startswith("transformers.models.") for each in type(model).__mro__):
        raise ValueError(f"parallelize: {name} is not a model of transformers itself")
    kind, layers = model.config.model_type, getattr(model.config, "layer_types", None) or ()
    if kind not in MODELS:
        raise ValueError(f"parallelize: {kind!r} has layers that are not known here; there are {', '.join(MODELS)}")
    strange = sorted(set(layers) - SOFTMAX_LAYERS - LINEAR_LAYERS)
    if strange:
        raise ValueError(f"parallelize: {kind!r}: layers of the kinds {', '.join(strange)} are not known here")
    for key, why in _unlike_one_rank(model.config):
        raise ValueError(f"parallelize: {kind!r}: {key}: {why}")
    head = model.get_output_embeddings()
    if head is None or head.bias is not None:
        raise ValueError(f"parallelize: {name}: expected a model for causal language modelling, its head without bias")
    return sum(layer in LINEAR_LAYERS for layer in layers)


def _unlike_one_rank(config: Any) -> Iterator[tuple[str, str]]:
    """The keys of a configuration by which ranks would compute something else than one does, and why."""
    if getattr(config, "output_router_logits", False):
        yield "output_router_logits", "its losses would be those of one rank's tokens"
    if getattr(config, "is_causal", None) is False:
        yield "is_causal", "layers here see earlier tokens alone"
    if getattr(config, "router_jitter_noise", 0):
        yield "router_jitter_noise", "every rank would draw noise of its own; set it to 0"
    positions = getattr(config, "rope_parameters", None) or {}
    for each in (positions, *(value for value in positions.values() if isinstance(value, dict))):
        if each.get("rope_type") in ("dynamic", "longrope"):
            why = f"angles of the type {each['rope_type']!r} hang on the length, of which a rank sees a part"
            yield "rope_parameters", why


def _head(
    head: Any, x: Tensor, labels: Tensor | None = None, tile: int = 0, scale: float = 1.0
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits of `x [B, T, D]`, or with labels `[B, T]` their negative log likelihoods in tiles, summed times `scale`.

    In the head's own call, so that what shards it gathers its matrix, and adds up its gradient.
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
        raise ValueError("return_dict: what comes back is a dictionary")
    given = [name for name, value in arguments.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)}: not computed over ranks")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)}: expected one of padding, {list(input_ids.shape)}; documents "
            "are told by position_ids that begin anew"
        )
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError("attention_mask: tokens are hidden before others; only padding at the end may be")
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
    following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], dim=1)
    count = (following != IGNORE).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    # A number and no tensor, which mixed precision would round.
    share, _ = head(hidden, layout.shard(following, fill=IGNORE), plan.loss_tile, 1 / float(count))
    factor = float(plan.mesh.cp.size) if plan.mean_over_ranks else 1.0
    loss = _Whole.apply(share, plan.mesh.cp, factor)  # type: ignore[no-untyped-call]
    return SequenceOutput(loss=loss, layout=layout)


class _Whole(torch.autograd.Function):
    """The sum of all ranks' shares of a loss; each has the gradient of its own share, times a factor."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, axis: Axis, factor: float) -> Tensor:
        ctx.factor = factor
        return share.clone() if axis.group is None else all_reduce(share.clone(), axis.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] * ctx.factor, None, None


def document_bounds(input_ids: Tensor, position_ids: Tensor | None) -> tuple[int, ...]:
    """The `cu_seqlens` of sequences `[B, T]` whose documents' positions begin at 0.

    Waits for the device. Raises ValueError where the rows are packed in different ways.
    """
    length = input_ids.shape[1]
    if position_ids is None:
        return 0, length
    rows = position_ids.expand_as(input_ids)
    if not bool((rows == rows[:1]).all()):
        raise ValueError("position_ids: the rows of a batch are packed in different ways; pack them into one row")
    begins = (rows[0] == 0).nonzero()[:, 0].tolist()
    return tuple(dict.fromkeys([0, *begins, length]))

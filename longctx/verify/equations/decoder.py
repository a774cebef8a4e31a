"""Equations of the decoder: logits, cross-entropy and the routers' losses of one packed sequence, in float64.

They cost a Python step per token and layer, and memory of size T x T and T x vocabulary: for short sequences only.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longctx.config import Config
from longctx.errors import UserError
from longctx.mixers.base import MixerConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.decoder import Decoder
from longctx.verify.equations.common import (
    HeadFactors,
    LayerContext,
    Parameters,
    parameters_of,
    split_heads,
    weighted_norm,
)
from longctx.verify.equations.constant_decay import lightning, linear, retention
from longctx.verify.equations.delta import deltanet, gated_deltanet, kda
from longctx.verify.equations.experts import moe, swiglu
from longctx.verify.equations.gated import gla, hgrn2, lightnet, mamba2, simple_gla
from longctx.verify.equations.routing import heads_by_norm, learned_heads
from longctx.verify.equations.softmax import attention_experts, softmax, softmax_weights

MIXERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "linear": (linear, "heads head_dim kv_heads feature_map normalize"),
    "lightning": (lightning, "heads head_dim form norm_eps"),
    "retention": (retention, "heads head_dim value_dim rope_theta"),
    "simple_gla": (simple_gla, "heads head_dim value_dim conv gate_divisor"),
    "gla": (gla, "heads head_dim value_dim conv gate_rank gate_divisor"),
    "hgrn2": (hgrn2, "heads head_dim value_dim conv"),
    "lightnet": (lightnet, "heads head_dim value_dim conv gate_rank"),
    "mamba2": (mamba2, "heads head_dim state_dim groups conv conv_bias dt_min dt_max"),
    "deltanet": (deltanet, "heads head_dim conv negative_eigenvalues"),
    "gated_deltanet": (gated_deltanet, "heads head_dim conv negative_eigenvalues value_dim qk_heads"),
    "kda": (kda, "heads head_dim conv negative_eigenvalues value_dim"),
    "softmax": (
        softmax,
        "heads kv_heads head_dim rope_theta rotary_dim rope_scaling qk_norm output_gate window",
    ),
    "attention_experts": (attention_experts, "experts heads kv_heads head_dim rope_theta window kv"),
}
"""The equations of each mixer, by its table in a recipe, and the keys that they implement."""
FFNS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], str]] = {
    "swiglu": (swiglu, "hidden"),
    "moe": (
        moe,
        "experts active hidden shared shared_hidden shared_gate router similarity_dim temperature score normalize "
        "scale groups active_groups balance z bias_rate jitter capacity",
    ),
}
"""The same of each feed-forward."""
OTHERS = {
    "": "layers depth dim ffn block residual norm norm_eps tie_embeddings heads vocab_size",
    "heads": "mixers active shared router balance",
    "softmax.rope_scaling": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
}
"""The same of the model itself and of nested tables."""


def uncovered(config: ModelConfig) -> list[str]:
    """Return the mixers, feed-forwards and keys of a model that no equation here implements, each as a sentence.

    A key that has its default needs none.
    """
    keys = {name: known for name, (_, known) in (MIXERS | FFNS).items()} | OTHERS
    return list(_uncovered(config, "", keys))


def _uncovered(table: Config, path: str, keys: dict[str, str]) -> Iterator[str]:
    if path not in keys:
        yield f"model.{path} has no equations"
        return
    for key, field in type(table).model_fields.items():
        value, nested = getattr(table, key), f"{path}.{key}".lstrip(".")
        if isinstance(value, Config):
            yield from _uncovered(value, nested, keys)
        elif key not in keys[path].split() and value != field.default:
            yield f"model.{nested} = {value!r} is in no equation"


def check_covered(config: ModelConfig) -> None:
    """Raise UserError if the equations do not implement a mixer, feed-forward or key of the model."""
    problems = uncovered(config)
    if problems:
        raise UserError(f"{'; '.join(problems)}: write it in longctx/verify/equations, or verify without it")


def head_factors(p: Parameters, x: Tensor, table: MixerConfig, config: ModelConfig, layer: int) -> HeadFactors | None:
    """Route the tokens of a mixer's input x `[B, T, D]` to its heads; None if it is no mixture of heads."""
    count, heads = config.routed_heads(layer), config.heads
    if heads is None or count is None:
        return None
    if heads.router == "learned":
        return learned_heads(p.head_router, x, heads, count)
    if not isinstance(table, SoftmaxConfig):
        raise ValueError(f"equations: {table.name} has no query norms to route by")
    head_dim = table.head_dim or x.shape[-1] // count
    return heads_by_norm(split_heads(x @ p.qkv.weight[: count * head_dim].T, count), heads)


def block(p: Parameters, x: Tensor, config: ModelConfig, context: LayerContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a block for x `[B, T, D]`; return its output and its routers' losses, by `mixer` and `ffn`."""
    table, feed_forward = config.mixer(context.layer), config.feed_forward(context.layer)
    residual = config.residual or {}
    losses = {}

    def norm(name: str, stream: Tensor) -> Tensor:
        return weighted_norm(stream, getattr(p, name).weight, config.norm, config.norm_eps)

    def add(name: str, stream: Tensor, out: Tensor) -> Tensor:
        keep, scale = residual.get(name, (1.0, 1.0))
        return keep * stream + scale * out

    def attention() -> Tensor:
        if not isinstance(table, SoftmaxConfig):
            raise ValueError(f"equations: {table.name} has no attention to route by")
        return softmax_weights(p.mixer, mixer_input, table, context)[0]

    mixer_input = norm("mixer_norm", x)
    factors = head_factors(p.mixer, mixer_input, table, config, context.layer)
    if factors is not None:
        losses["mixer"] = factors.loss
    equation, _ = MIXERS[table.name]
    mixed = equation(p.mixer, mixer_input, table, context, factors)
    x = add(table.name, mixer_input if config.block == "postnorm" else x, mixed)
    if feed_forward is not None:
        ffn_input = mixer_input if config.block == "parallel" else norm("ffn_norm", x)
        feed, _ = FFNS[feed_forward.name]
        fed, loss = feed(p.ffn, ffn_input, feed_forward, context, attention)
        if loss is not None:
            losses["ffn"] = loss
        x = add(feed_forward.name, ffn_input if config.block == "postnorm" else x, fed)
    return x, losses


def reference_losses(
    model: Decoder, config: ModelConfig, tokens: Tensor, labels: Tensor, bounds: tuple[int, ...], *, sequence: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute a sequence's logits `[1, T, N]`, its loss and its routers' losses, by layer name (`blocks.3.ffn`).

    Shapes: tokens and labels `[1, T]` int64, labels already shifted, negative for a token without one; `bounds` are
    the document boundaries, `sequence` the index of the sequence. The loss is the sum of the negative log likelihoods
    (nats). As in training (router noise, capacity), and differentiable with respect to the parameters, which are
    float64. Only parameters and persistent buffers of `model` are read.
    """
    p: Any = parameters_of(model)
    x = p.embedding.weight[tokens]
    losses: dict[str, Tensor] = {}
    for layer in range(config.depth):
        context = LayerContext(bounds, layer, config.depth, config.norm_eps, sequence)
        # Computed again in the backward pass, so that the states of all tokens are in memory for one layer at a time.
        x, of_block = checkpoint(
            block, getattr(p.blocks, str(layer)), x, config, context, use_reentrant=False, preserve_rng_state=False
        )
        losses |= {f"blocks.{layer}.{name}": loss for name, loss in of_block.items()}
    x = weighted_norm(x, p.norm.weight, config.norm, config.norm_eps)
    logits = x @ (p.embedding if config.tie_embeddings else p.head).weight.T
    there = labels >= 0
    picked = logits.log_softmax(dim=-1)[there].gather(-1, labels[there][:, None])
    return logits, -picked.sum(), losses

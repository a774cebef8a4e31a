"""Llama and Mixtral, and their parts that other families share: attention, feed-forwards, experts."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from longctx.convert.families.base import Family, Keys, table_of
from longctx.convert.row_table import RowRange, RowTable
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig

NO_LIMIT = 2**20
"""`max_position_embeddings` of exports; it has no effect unless positions are scaled."""
_NO_BIAS = "projections have no bias"
_NO_DROPOUT = "there is no dropout; set it to 0 if it is only for training"


def read_backbone(keys: Keys, eps: float) -> dict[str, Any]:
    """Read width, depth, vocabulary and norms; `eps` is the family's default."""
    keys.only("hidden_act", "silu", "swish", why="feed-forwards are gated by SiLU")
    keys.only("attention_dropout", 0, why=_NO_DROPOUT)
    keys.only("attention_bias", False, why=_NO_BIAS)
    keys.ignore("max_position_embeddings")
    return {
        "depth": keys.integer("num_hidden_layers"),
        "dim": keys.integer("hidden_size"),
        "vocab_size": keys.integer("vocab_size"),
        "norm_eps": keys.number("rms_norm_eps", eps),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
    }


def write_backbone(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of `config.json` for width, depth, vocabulary and norms."""
    scaling = table_of(model, SoftmaxConfig).rope_scaling if SoftmaxConfig.letter in model.pattern else None
    limit = NO_LIMIT if scaling is None else int(scaling.factor * scaling.original_max_position_embeddings)
    return {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "num_hidden_layers": model.depth,
        "hidden_size": model.dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": limit,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def read_attention(
    keys: Keys, theta: float, kv_heads: int | None = None, head_dim: int | None = None, *, partial: bool = False
) -> dict[str, Any]:
    """Read `[model.softmax]`; `theta`, `kv_heads` and `head_dim` are the family's defaults, `partial` allows partial
    rotary embeddings."""
    heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", head_dim or max(1, keys.integer("hidden_size") // heads))
    fields: dict[str, Any] = {
        "heads": heads,
        "kv_heads": keys.integer("num_key_value_heads", kv_heads or heads),
        "head_dim": head_dim,
    }
    return fields | _read_positions(keys, theta, head_dim, partial)


def _read_positions(keys: Keys, theta: float, head_dim: int, partial: bool) -> dict[str, Any]:
    key = "rope_scaling" if "rope_scaling" in keys else "rope_parameters"
    table = keys.raw(key) or {}
    keys.ignore("rope_scaling", "rope_parameters")
    if not isinstance(table, dict):
        keys.problems.append(f"{key}: {table!r} is not a table")
        table = {}
    inner = Keys(table)
    kind = inner.raw("rope_type") or inner.raw("type") or "default"
    inner.ignore("type", "rope_type")
    fields: dict[str, Any] = {"rope_theta": inner.number("rope_theta", keys.number("rope_theta", theta))}
    fraction = inner.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0 if not partial else 0.25))
    if partial:
        fields["rotary_dim"] = int(head_dim * fraction)
    elif fraction != 1:
        inner.problems.append(f"partial_rotary_factor: {fraction}, which transformers ignores for this model")
    if kind == "llama3":
        original = inner.integer("original_max_position_embeddings", keys.integer("max_position_embeddings", 1))
        fields["rope_scaling"] = {
            "factor": inner.number("factor", 1.0),
            "low_freq_factor": inner.number("low_freq_factor", 1.0),
            "high_freq_factor": inner.number("high_freq_factor", 4.0),
            "original_max_position_embeddings": original,
        }
        missing = [name for name in ("factor", "low_freq_factor", "high_freq_factor") if name not in inner]
        inner.problems += [f"{name}: missing" for name in missing]
    elif kind != "default":
        inner.problems.append(f"rope_type: {kind!r} is not supported, only 'default' or 'llama3'")
    inner.refuse_unread()
    keys.problems += [f"{key}.{problem}" for problem in inner.problems]
    return fields


def write_attention(softmax: SoftmaxConfig, dim: int) -> dict[str, Any]:
    """Return the keys of `config.json` for softmax attention."""
    head_dim = softmax.head_dim or dim // softmax.heads
    positions: dict[str, Any] = {"rope_type": "default", "rope_theta": softmax.rope_theta}
    if softmax.rope_scaling is not None:
        positions |= {"rope_type": "llama3", **softmax.rope_scaling.model_dump()}
    return {
        "num_attention_heads": softmax.heads,
        "num_key_value_heads": softmax.kv_heads or softmax.heads,
        "head_dim": head_dim,
        "rope_parameters": positions,
    }


def read_experts(keys: Keys, experts: str, hidden: str, active: int = 2) -> dict[str, Any]:
    """Read `[model.moe]`; `experts` and `hidden` are the keys of the number of experts and their width, `active` is the
    family's default."""
    keys.only("router_jitter_noise", 0, why="the router's noise differs from that of transformers")
    return {
        "experts": keys.integer(experts),
        "active": keys.integer("num_experts_per_tok", active),
        "hidden": keys.integer(hidden),
    }


def put_backbone(table: RowTable, model: ModelConfig) -> None:
    """Map the embedding, the output head and the norms."""
    table.put("embedding.weight", "model.embed_tokens.weight")
    table.put("norm.weight", "model.norm.weight")
    if not model.tie_embeddings:
        table.put("head.weight", "lm_head.weight")
    for layer in range(model.depth):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        table.put(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight")
        table.put(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight")


def put_attention(
    table: RowTable, softmax: SoftmaxConfig, dim: int, layer: int, q: Sequence[RowRange] | None = None
) -> None:
    """Map queries, keys, values and the output; `q` are the queries' ranges if they share a matrix."""
    ours, theirs = f"blocks.{layer}.mixer", f"model.layers.{layer}.self_attn"
    head_dim = softmax.head_dim or dim // softmax.heads
    kv = (softmax.kv_heads or softmax.heads) * head_dim
    q = q or [RowRange(f"{theirs}.q_proj.weight", 0, softmax.heads * head_dim)]
    k, v = (RowRange(f"{theirs}.{name}_proj.weight", 0, kv) for name in "kv")
    table.put(f"{ours}.qkv.weight", *q, k, v)
    table.put(f"{ours}.out.weight", f"{theirs}.o_proj.weight")


def put_swiglu(table: RowTable, ours: str, theirs: str, hidden: int) -> None:
    """Map a dense feed-forward of width `hidden`."""
    gate, up = (RowRange(f"{theirs}.{name}_proj.weight", 0, hidden) for name in ("gate", "up"))
    table.put(f"{ours}.gate_up.weight", gate, up)
    table.put(f"{ours}.down.weight", f"{theirs}.down_proj.weight")


def width(model: ModelConfig) -> int:
    """Return the width of a model's dense feed-forwards."""
    table: SwigluConfig | None = getattr(model, SwigluConfig.name)
    return (table or SwigluConfig()).width(model.dim)


def put_experts(table: RowTable, moe: MoeConfig, dim: int, ours: str, theirs: str, names: tuple[str, str, str]) -> None:
    """Map the router and the experts; `names` are those of an expert's gate, up and down matrices."""
    table.put(f"{ours}.router.weight", f"{theirs}.gate.weight")
    experts = [f"{theirs}.experts.{expert}" for expert in range(moe.experts)]
    gate, up, down = (f"{name}.weight" for name in names)
    gates = [RowRange(f"{expert}.{name}", 0, moe.hidden) for expert in experts for name in (gate, up)]
    table.put(f"{ours}.experts.gate_up", *gates)
    table.put(f"{ours}.experts.down", *(RowRange(f"{expert}.{down}", 0, dim) for expert in experts))


class Llama(Family):
    """Softmax attention and dense feed-forwards."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    letters: ClassVar[str] = "S"
    ffns: ClassVar[tuple[str, ...]] = ("swiglu",)

    def read(self, keys: Keys) -> dict[str, Any]:
        keys.only("mlp_bias", False, why=_NO_BIAS)
        keys.ignore("pretraining_tp")
        hidden = keys.integer("intermediate_size")
        softmax = read_attention(keys, 1e4)
        if keys.integer("hidden_size") % softmax["heads"]:
            keys.problems.append("num_attention_heads: must divide hidden_size for llama in transformers")
        return read_backbone(keys, 1e-6) | {
            "layers": "S",
            "ffn": "swiglu",
            "softmax": softmax,
            "swiglu": {"hidden": hidden},
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            **write_backbone(model),
            **write_attention(table_of(model, SoftmaxConfig), model.dim),
            "intermediate_size": width(model),
            "attention_bias": False,
            "mlp_bias": False,
        }

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        put_backbone(table, model)
        for layer in range(model.depth):
            put_attention(table, table_of(model, SoftmaxConfig), model.dim, layer)
            put_swiglu(table, f"blocks.{layer}.ffn", f"model.layers.{layer}.mlp", width(model))
        return table


class Mixtral(Family):
    """Softmax attention, optionally with a sliding window, and experts in every layer."""

    model_type: ClassVar[str] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    letters: ClassVar[str] = "S"
    ffns: ClassVar[tuple[str, ...]] = ("moe",)

    def read(self, keys: Keys) -> dict[str, Any]:
        softmax = read_attention(keys, 1e6, 8)
        if "sliding_window" in keys:
            softmax["window"] = keys.integer("sliding_window")
        keys.ignore("sliding_window")
        moe = read_experts(keys, "num_local_experts", "intermediate_size")
        return read_backbone(keys, 1e-5) | {"layers": "S", "ffn": "moe", "softmax": softmax, "moe": moe}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        moe = table_of(model, MoeConfig)
        return {
            **write_backbone(model),
            **write_attention(table_of(model, SoftmaxConfig), model.dim),
            "sliding_window": table_of(model, SoftmaxConfig).window,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "intermediate_size": moe.hidden,
        }

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        put_backbone(table, model)
        for layer in range(model.depth):
            put_attention(table, table_of(model, SoftmaxConfig), model.dim, layer)
            ours, theirs = f"blocks.{layer}.ffn", f"model.layers.{layer}.block_sparse_moe"
            put_experts(table, table_of(model, MoeConfig), model.dim, ours, theirs, ("w1", "w3", "w2"))
        return table

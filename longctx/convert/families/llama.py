"""Llama and Mixtral, and what other families have like them: attention, feed-forwards, experts."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from longctx.convert.families.base import Family, Keys, part
from longctx.convert.row_table import RowTable, Run
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig

NO_LIMIT = 2**20
"""`max_position_embeddings` of what is written: no number that is computed with, where positions are not scaled."""
_NO_BIAS = "matrices here have no bias"
_NO_DROPOUT = "there is no dropout here; set it to 0 where it was for training alone"


def read_stream(keys: Keys, eps: float) -> dict[str, Any]:
    """Width, depth, vocabulary, norms; `eps` is the family's default."""
    keys.only("hidden_act", "silu", "swish", why="feed-forwards are gated by SiLU here")
    keys.only("attention_dropout", 0, why=_NO_DROPOUT)
    keys.only("attention_bias", False, why=_NO_BIAS)
    keys.pass_over("max_position_embeddings")
    return {
        "depth": keys.integer("num_hidden_layers"),
        "dim": keys.integer("hidden_size"),
        "vocab_size": keys.integer("vocab_size"),
        "norm_eps": keys.number("rms_norm_eps", eps),
        "tie_embeddings": keys.flag("tie_word_embeddings", False),
    }


def write_stream(model: ModelConfig) -> dict[str, Any]:
    """The same as keys of `config.json`."""
    scaling = part(model, SoftmaxConfig).rope_scaling if SoftmaxConfig.letter in model.pattern else None
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
    """`[model.softmax]`; `theta`, `kv_heads` and `head_dim` are the family's defaults, `partial` whether some channels
    may stay."""
    heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", head_dim or max(1, keys.integer("hidden_size") // heads))
    found: dict[str, Any] = {
        "heads": heads,
        "kv_heads": keys.integer("num_key_value_heads", kv_heads or heads),
        "head_dim": head_dim,
    }
    return found | _read_positions(keys, theta, head_dim, partial)


def _read_positions(keys: Keys, theta: float, head_dim: int, partial: bool) -> dict[str, Any]:
    key = "rope_scaling" if "rope_scaling" in keys else "rope_parameters"
    given = keys.raw(key) or {}
    keys.pass_over("rope_scaling", "rope_parameters")
    if not isinstance(given, dict):
        keys.problems.append(f"{key}: {given!r} is no table")
        given = {}
    inner = Keys(given)
    kind = inner.raw("rope_type") or inner.raw("type") or "default"
    inner.pass_over("type", "rope_type")
    found: dict[str, Any] = {"rope_theta": inner.number("rope_theta", keys.number("rope_theta", theta))}
    share = inner.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0 if not partial else 0.25))
    if partial:
        found["rotary_dim"] = int(head_dim * share)
    elif share != 1:
        inner.problems.append(f"partial_rotary_factor: {share}, which transformers does not read for this model")
    if kind == "llama3":
        longest = inner.integer("original_max_position_embeddings", keys.integer("max_position_embeddings", 1))
        found["rope_scaling"] = {
            "factor": inner.number("factor", 1.0),
            "low_freq_factor": inner.number("low_freq_factor", 1.0),
            "high_freq_factor": inner.number("high_freq_factor", 4.0),
            "original_max_position_embeddings": longest,
        }
        missing = [name for name in ("factor", "low_freq_factor", "high_freq_factor") if name not in inner]
        inner.problems += [f"{name}: is missing" for name in missing]
    elif kind != "default":
        inner.problems.append(f"rope_type: {kind!r}, where 'default' or 'llama3' can be converted")
    inner.refuse_the_rest()
    keys.problems += [f"{key}.{problem}" for problem in inner.problems]
    return found


def write_attention(softmax: SoftmaxConfig, dim: int) -> dict[str, Any]:
    """The same as keys of `config.json`."""
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
    """`[model.moe]`, by the names of the keys that count experts and give their width; `active` is the family's
    default."""
    keys.only("router_jitter_noise", 0, why="noise of a router is not that of transformers here")
    return {
        "experts": keys.integer(experts),
        "active": keys.integer("num_experts_per_tok", active),
        "hidden": keys.integer(hidden),
    }


def put_stream(table: RowTable, model: ModelConfig) -> None:
    """Embedding, head, norms."""
    table.put("embedding.weight", "model.embed_tokens.weight")
    table.put("norm.weight", "model.norm.weight")
    if not model.tie_embeddings:
        table.put("head.weight", "lm_head.weight")
    for layer in range(model.depth):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        table.put(f"{ours}.mixer_norm.weight", f"{theirs}.input_layernorm.weight")
        table.put(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight")


def put_attention(
    table: RowTable, softmax: SoftmaxConfig, dim: int, layer: int, q: Sequence[Run] | None = None
) -> None:
    """Queries, keys, values and the output; `q` where the queries are not a matrix of their own."""
    ours, theirs = f"blocks.{layer}.mixer", f"model.layers.{layer}.self_attn"
    head_dim = softmax.head_dim or dim // softmax.heads
    kv = (softmax.kv_heads or softmax.heads) * head_dim
    q = q or [Run(f"{theirs}.q_proj.weight", 0, softmax.heads * head_dim)]
    k, v = (Run(f"{theirs}.{name}_proj.weight", 0, kv) for name in "kv")
    table.put(f"{ours}.qkv.weight", *q, k, v)
    table.put(f"{ours}.out.weight", f"{theirs}.o_proj.weight")


def put_swiglu(table: RowTable, ours: str, theirs: str, hidden: int) -> None:
    """A dense feed-forward of this width."""
    gate, up = (Run(f"{theirs}.{name}_proj.weight", 0, hidden) for name in ("gate", "up"))
    table.put(f"{ours}.gate_up.weight", gate, up)
    table.put(f"{ours}.down.weight", f"{theirs}.down_proj.weight")


def width(model: ModelConfig) -> int:
    """That of its dense feed-forwards."""
    table: SwigluConfig | None = getattr(model, SwigluConfig.name)
    return (table or SwigluConfig()).width(model.dim)


def put_experts(table: RowTable, moe: MoeConfig, dim: int, ours: str, theirs: str, names: tuple[str, str, str]) -> None:
    """Router and experts; `names` of an expert's gate, up and down."""
    table.put(f"{ours}.router.weight", f"{theirs}.gate.weight")
    each = [f"{theirs}.experts.{expert}" for expert in range(moe.experts)]
    gate, up, down = (f"{name}.weight" for name in names)
    gates = [Run(f"{expert}.{name}", 0, moe.hidden) for expert in each for name in (gate, up)]
    table.put(f"{ours}.experts.gate_up", *gates)
    table.put(f"{ours}.experts.down", *(Run(f"{expert}.{down}", 0, dim) for expert in each))


class Llama(Family):
    """Softmax attention and dense feed-forwards."""

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    letters: ClassVar[str] = "S"
    ffns: ClassVar[tuple[str, ...]] = ("swiglu",)

    def read(self, keys: Keys) -> dict[str, Any]:
        keys.only("mlp_bias", False, why=_NO_BIAS)
        keys.pass_over("pretraining_tp")
        hidden = keys.integer("intermediate_size")
        softmax = read_attention(keys, 1e4)
        if keys.integer("hidden_size") % softmax["heads"]:
            keys.problems.append("num_attention_heads: transformers wants a llama's to divide hidden_size")
        return read_stream(keys, 1e-6) | {
            "layers": "S",
            "ffn": "swiglu",
            "softmax": softmax,
            "swiglu": {"hidden": hidden},
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            **write_stream(model),
            **write_attention(part(model, SoftmaxConfig), model.dim),
            "intermediate_size": width(model),
            "attention_bias": False,
            "mlp_bias": False,
        }

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        put_stream(table, model)
        for layer in range(model.depth):
            put_attention(table, part(model, SoftmaxConfig), model.dim, layer)
            put_swiglu(table, f"blocks.{layer}.ffn", f"model.layers.{layer}.mlp", width(model))
        return table


class Mixtral(Family):
    """Softmax attention, perhaps with a window, and experts in every layer."""

    model_type: ClassVar[str] = "mixtral"
    architecture: ClassVar[str] = "MixtralForCausalLM"
    letters: ClassVar[str] = "S"
    ffns: ClassVar[tuple[str, ...]] = ("moe",)

    def read(self, keys: Keys) -> dict[str, Any]:
        softmax = read_attention(keys, 1e6, 8)
        if "sliding_window" in keys:
            softmax["window"] = keys.integer("sliding_window")
        keys.pass_over("sliding_window")
        moe = read_experts(keys, "num_local_experts", "intermediate_size")
        return read_stream(keys, 1e-5) | {"layers": "S", "ffn": "moe", "softmax": softmax, "moe": moe}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        moe = part(model, MoeConfig)
        return {
            **write_stream(model),
            **write_attention(part(model, SoftmaxConfig), model.dim),
            "sliding_window": part(model, SoftmaxConfig).window,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "intermediate_size": moe.hidden,
        }

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        put_stream(table, model)
        for layer in range(model.depth):
            put_attention(table, part(model, SoftmaxConfig), model.dim, layer)
            ours, theirs = f"blocks.{layer}.ffn", f"model.layers.{layer}.block_sparse_moe"
            put_experts(table, part(model, MoeConfig), model.dim, ours, theirs, ("w1", "w3", "w2"))
        return table

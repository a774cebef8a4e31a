"""Qwen3-Next: gated delta rule and gated softmax attention, experts with a gated shared expert."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from longctx.convert.families.base import Family, Keys, period, table_of
from longctx.convert.families.llama import (
    put_attention,
    put_backbone,
    put_experts,
    put_swiglu,
    read_attention,
    read_backbone,
    read_experts,
    width,
    write_attention,
    write_backbone,
)
from longctx.convert.families.patterns import FULL, LINEAR, ranges_by_part, read_pattern
from longctx.convert.row_table import RowRange, RowTable
from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.model.moe import MoeConfig

_LETTERS = {LINEAR: GatedDeltaNetConfig.letter, FULL: SoftmaxConfig.letter}


class Qwen3Next(Family):
    """Layers of two kinds in any order, each with experts or a dense feed-forward."""

    model_type: ClassVar[str] = "qwen3_next"
    architecture: ClassVar[str] = "Qwen3NextForCausalLM"
    letters: ClassVar[str] = "".join(_LETTERS.values())
    ffns: ClassVar[tuple[str, ...]] = (SwigluConfig.name, MoeConfig.name)

    def ignores(self, name: str) -> bool:
        # Multi-token prediction heads, which transformers does not support.
        return name.startswith("mtp.") or super().ignores(name)

    def read(self, keys: Keys) -> dict[str, Any]:
        depth = keys.integer("num_hidden_layers")
        every = keys.integer("full_attention_interval", 4)
        default = [FULL if (layer + 1) % every == 0 else LINEAR for layer in range(depth)]
        pattern = read_pattern(keys, _LETTERS, default)
        ffns = self._feed_forwards(keys, depth)
        fields: dict[str, Any] = read_backbone(keys, 1e-6) | {
            "layers": period(pattern),
            "ffn": list(period(ffns)),
            "norm": "zero_centered_rms",
        }
        if SoftmaxConfig.letter in pattern:
            softmax = read_attention(keys, 1e4, 2, 256, partial=True)
            fields["softmax"] = softmax | {"qk_norm": "zero_centered_rms", "output_gate": True}
        if GatedDeltaNetConfig.letter in pattern:
            fields["gated_deltanet"] = {
                "heads": keys.integer("linear_num_value_heads", 32),
                "qk_heads": keys.integer("linear_num_key_heads", 16),
                "head_dim": keys.integer("linear_key_head_dim", 128),
                "value_dim": keys.integer("linear_value_head_dim", 128),
                "conv": keys.integer("linear_conv_kernel_dim", 4),
            }
        if MoeConfig.name in ffns:
            fields["moe"] = read_experts(keys, "num_experts", "moe_intermediate_size", 10) | {
                "normalize": keys.flag("norm_topk_prob", True),
                "shared": 1,
                "shared_hidden": keys.integer("shared_expert_intermediate_size"),
                "shared_gate": True,
            }
        if SwigluConfig.name in ffns:
            fields["swiglu"] = {"hidden": keys.integer("intermediate_size")}
        # Keys of kinds of layers that the model does not have.
        keys.ignore(*self._attention_keys, *self._expert_keys, "intermediate_size")
        return fields

    _attention_keys = (
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "linear_num_value_heads",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    )
    _expert_keys = (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "shared_expert_intermediate_size",
    )

    def _feed_forwards(self, keys: Keys, depth: int) -> list[str]:
        dense = keys.raw("mlp_only_layers") or []
        step = keys.integer("decoder_sparse_step", 1)
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            keys.problems.append(f"mlp_only_layers: {dense!r} is not a list of layers")
            dense = []
        experts = keys.raw("num_experts") != 0
        sparse = [experts and layer not in dense and (layer + 1) % step == 0 for layer in range(depth)]
        return [MoeConfig.name if is_sparse else SwigluConfig.name for is_sparse in sparse]

    def write(self, model: ModelConfig) -> dict[str, Any]:
        kinds = {letter: kind for kind, letter in _LETTERS.items()}
        dense = [layer for layer, name in enumerate(model.feed_forwards) if name == SwigluConfig.name]
        fields = {
            **write_backbone(model),
            "attention_bias": False,
            "layer_types": [kinds[letter] for letter in model.pattern],
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "intermediate_size": width(model),
        }
        if SoftmaxConfig.letter in model.pattern:
            softmax = table_of(model, SoftmaxConfig).resolved(model.dim)
            fields |= write_attention(softmax, model.dim)
            fields["rope_parameters"]["partial_rotary_factor"] = _rotary_fraction(softmax)
        if GatedDeltaNetConfig.letter in model.pattern:
            delta = table_of(model, GatedDeltaNetConfig).resolved(model.dim)
            fields |= {
                "linear_num_value_heads": delta.heads,
                "linear_num_key_heads": delta.qk_heads,
                "linear_key_head_dim": delta.head_dim,
                "linear_value_head_dim": delta.value_dim,
                "linear_conv_kernel_dim": max(1, delta.conv),
            }
        if len(dense) == model.depth:
            return fields | {"num_experts": 0}
        moe = table_of(model, MoeConfig)
        return fields | {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "moe_intermediate_size": moe.hidden,
            "norm_topk_prob": moe.normalize,
            "shared_expert_intermediate_size": moe.shared_width or moe.hidden,
        }

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        put_backbone(table, model)
        for layer, (letter, ffn) in enumerate(zip(model.pattern, model.feed_forwards, strict=True)):
            if letter == SoftmaxConfig.letter:
                self._put_softmax(table, table_of(model, SoftmaxConfig), model.dim, layer)
            else:
                self._put_delta(table, table_of(model, GatedDeltaNetConfig).resolved(model.dim), layer)
            ours, theirs = f"blocks.{layer}.ffn", f"model.layers.{layer}.mlp"
            if ffn == SwigluConfig.name:
                put_swiglu(table, ours, theirs, width(model))
                continue
            moe = table_of(model, MoeConfig)
            put_experts(table, moe, model.dim, ours, theirs, ("gate_proj", "up_proj", "down_proj"))
            put_swiglu(table, f"{ours}.shared", f"{theirs}.shared_expert", moe.shared_width)
            table.put(f"{ours}.shared_gate.weight", f"{theirs}.shared_expert_gate.weight")
        return table

    def _put_softmax(self, table: RowTable, softmax: SoftmaxConfig, dim: int, layer: int) -> None:
        """Map a softmax layer; the rows of `q_proj` are grouped by head, queries before gate."""
        ours, theirs = f"blocks.{layer}.mixer", f"model.layers.{layer}.self_attn"
        head_dim = softmax.head_dim or dim // softmax.heads
        name = f"{theirs}.q_proj.weight"
        q, gate = ([RowRange(name, (2 * h + i) * head_dim, head_dim) for h in range(softmax.heads)] for i in (0, 1))
        put_attention(table, softmax, dim, layer, q)
        table.put(f"{ours}.gate.weight", *gate)
        for norm in ("q_norm", "k_norm"):
            table.put(f"{ours}.{norm}.weight", f"{theirs}.{norm}.weight")

    def _put_delta(self, table: RowTable, delta: GatedDeltaNetConfig, layer: int) -> None:
        """Map a delta-rule layer; rows are grouped by key head: query, key, values and gates of its value heads."""
        ours, theirs = f"blocks.{layer}.mixer", f"model.layers.{layer}.linear_attn"
        heads, key_dim, value_dim = delta.qk_heads, delta.head_dim, delta.value_dim
        assert heads is not None
        assert key_dim is not None
        assert value_dim is not None
        group = delta.heads // heads
        parts = {"q": key_dim, "k": key_dim, "v": group * value_dim, "z": group * value_dim}
        ranges = ranges_by_part(f"{theirs}.in_proj_qkvz.weight", heads, parts)
        table.put(f"{ours}.qkv.weight", *ranges["q"], *ranges["k"], *ranges["v"])
        table.put(f"{ours}.gate.weight", *ranges["z"])
        ranges = ranges_by_part(f"{theirs}.in_proj_ba.weight", heads, {"b": group, "a": group})
        table.put(f"{ours}.beta.weight", *ranges["b"])
        table.put(f"{ours}.step.weight", *ranges["a"])
        table.put(f"{ours}.conv.weight", f"{theirs}.conv1d.weight", conv=True)
        for name, other in (("decay.A_log", "A_log"), ("decay.dt_bias", "dt_bias"), ("norm.weight", "norm.weight")):
            table.put(f"{ours}.{name}", f"{theirs}.{other}")
        table.put(f"{ours}.out.weight", f"{theirs}.out_proj.weight")


def _rotary_fraction(softmax: SoftmaxConfig) -> float:
    """Return the fraction of rotary channels, such that transformers, which rounds down, computes the same number."""
    assert softmax.rotary_dim is not None
    assert softmax.head_dim is not None
    fraction = softmax.rotary_dim / softmax.head_dim
    return fraction if int(softmax.head_dim * fraction) == softmax.rotary_dim else math.nextafter(fraction, 2)

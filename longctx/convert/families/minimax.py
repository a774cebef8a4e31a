"""MiniMax-01: lightning and softmax attention, experts in every layer, post-norm residual stream."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from longctx.convert.families.base import Family, Keys, period, table_of
from longctx.convert.families.llama import (
    put_attention,
    put_backbone,
    put_experts,
    read_attention,
    read_backbone,
    read_experts,
    write_attention,
    write_backbone,
)
from longctx.convert.families.patterns import FULL, LINEAR, ranges_by_part, read_pattern
from longctx.convert.row_table import RowTable
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.moe import MoeConfig

_LETTERS = {LINEAR: LightningConfig.letter, FULL: SoftmaxConfig.letter}
_FACTORS = {SoftmaxConfig.name: "full_attn", LightningConfig.name: "linear_attn", MoeConfig.name: "mlp"}
"""Prefixes of the keys of residual factors, by the name of the mixer or feed-forward."""
_NORM_EPS = 1e-6
"""Epsilon of the norm in lightning layers, which has no key."""
_BLOCK = 256
"""Default of `block_size`: tokens for which transformers stores powers of the decays."""


class MiniMax(Family):
    """Layers of two kinds in any order."""

    model_type: ClassVar[str] = "minimax"
    architecture: ClassVar[str] = "MiniMaxForCausalLM"
    letters: ClassVar[str] = "".join(_LETTERS.values())
    ffns: ClassVar[tuple[str, ...]] = (MoeConfig.name,)

    def read(self, keys: Keys) -> dict[str, Any]:
        depth = keys.integer("num_hidden_layers")
        pattern = read_pattern(keys, _LETTERS, [LINEAR if layer % 2 else FULL for layer in range(depth)])
        softmax = read_attention(keys, 1e6, 8)
        if "sliding_window" in keys:
            softmax["window"] = keys.integer("sliding_window")
        keys.ignore("sliding_window")
        keys.integer("block_size", _BLOCK)
        keys.only("rotary_dim", softmax["head_dim"], why="transformers rotates all channels of a head")
        keys.only("postnorm", True, why="transformers has only the post-norm residual stream")
        fields = read_backbone(keys, 1e-5) | {
            "layers": period(pattern),
            "ffn": MoeConfig.name,
            "block": "postnorm",
            "residual": self._factors(keys, pattern),
            "moe": read_experts(keys, "num_local_experts", "intermediate_size"),
        }
        if SoftmaxConfig.letter in pattern:
            fields["softmax"] = softmax
        if LightningConfig.letter in pattern:
            same = {"heads": softmax["heads"], "head_dim": softmax["head_dim"]}
            fields["lightning"] = {**same, "form": "minimax", "norm_eps": _NORM_EPS}
        return fields

    def _factors(self, keys: Keys, pattern: str) -> dict[str, list[float]] | None:
        factors = {}
        for name, word in _FACTORS.items():
            pair = [keys.number(f"{word}_{kind}_factor", 1.0) for kind in ("alpha", "beta")]
            letter = {kind.name: kind.letter for kind in (SoftmaxConfig, LightningConfig)}.get(name)
            if pair != [1.0, 1.0] and (letter is None or letter in pattern):
                factors[name] = pair
        return factors or None

    def write(self, model: ModelConfig) -> dict[str, Any]:
        kinds = {letter: kind for kind, letter in _LETTERS.items()}
        moe = table_of(model, MoeConfig)
        factors: dict[str, float] = {}
        for name, word in _FACTORS.items():
            alpha, beta = (model.residual or {}).get(name, (1.0, 1.0))
            factors |= {f"{word}_alpha_factor": alpha, f"{word}_beta_factor": beta}
        fields = {
            **write_backbone(model),
            **factors,
            "layer_types": [kinds[letter] for letter in model.pattern],
            "block_size": _BLOCK,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "intermediate_size": moe.hidden,
        }
        if SoftmaxConfig.letter in model.pattern:
            softmax = table_of(model, SoftmaxConfig)
            return fields | write_attention(softmax, model.dim) | {"sliding_window": softmax.window}
        lightning = table_of(model, LightningConfig).resolved(model.dim)
        heads = {"num_attention_heads": lightning.heads, "num_key_value_heads": lightning.heads}
        return fields | heads | {"head_dim": lightning.head_dim}

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        put_backbone(table, model)
        for layer, letter in enumerate(model.pattern):
            if letter == SoftmaxConfig.letter:
                put_attention(table, table_of(model, SoftmaxConfig), model.dim, layer)
            else:
                self._put_lightning(table, table_of(model, LightningConfig).resolved(model.dim), layer)
            ours, theirs = f"blocks.{layer}.ffn", f"model.layers.{layer}.block_sparse_moe"
            put_experts(table, table_of(model, MoeConfig), model.dim, ours, theirs, ("w1", "w3", "w2"))
        return table

    def _put_lightning(self, table: RowTable, lightning: LightningConfig, layer: int) -> None:
        """Map a lightning layer; the rows of qkv are grouped by head, and the gate is a separate matrix."""
        ours, theirs = f"blocks.{layer}.mixer", f"model.layers.{layer}.self_attn"
        assert lightning.head_dim is not None
        ranges = ranges_by_part(f"{theirs}.qkv_proj.weight", lightning.heads, dict.fromkeys("qkv", lightning.head_dim))
        table.put(f"{ours}.qkvu.weight", *ranges["q"], *ranges["k"], *ranges["v"], f"{theirs}.output_gate.weight")
        table.put(f"{ours}.norm.weight", f"{theirs}.norm.weight")
        table.put(f"{ours}.out.weight", f"{theirs}.out_proj.weight")

    def derived(self, model: ModelConfig, values: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
        """Return the decays of lightning layers and their powers up to `block_size`, which its files include."""
        tensors: dict[str, Callable[[], Tensor]] = {}
        for layer, letter in enumerate(model.pattern):
            if letter != LightningConfig.letter:
                continue
            heads, name = table_of(model, LightningConfig).heads, f"model.layers.{layer}.self_attn"
            rate = partial(_rates, heads, layer, model.depth)
            tokens = torch.arange(1, (values.get("block_size") or _BLOCK) + 1)
            tensors[f"{name}.slope_rate"] = rate
            tensors[f"{name}.query_decay"] = partial(_decays, rate, tokens[:, None])
            tensors[f"{name}.key_decay"] = partial(_decays, rate, len(tokens) - tokens[:, None])
            tensors[f"{name}.diagonal_decay"] = partial(_causal_decays, rate, tokens[:, None] - tokens)
        return tensors


def _rates(heads: int, layer: int, depth: int) -> Tensor:
    """Return the log decay per token, negated, `[H, 1, 1]`, rounded as in transformers."""
    slopes = (1 / 2 ** (8 / heads)) ** torch.arange(1, heads + 1)
    return (slopes * (1 - layer / (depth - 1 + 1e-5) + 1e-5))[:, None, None]


def _decays(rate: Callable[[], Tensor], tokens: Tensor) -> Tensor:
    """Return the decay over `tokens`, `[H, n, 1]`."""
    return torch.exp(-rate() * tokens)


def _causal_decays(rate: Callable[[], Tensor], distance: Tensor) -> Tensor:
    """Return the causal decay between tokens of a block, `[1, H, n, n]`; 0 above the diagonal."""
    return torch.exp(-rate() * distance[None, None]).tril()

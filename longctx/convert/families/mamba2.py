"""Mamba-2: only state-space layers."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from longctx.convert.families.base import Family, Keys, table_of
from longctx.convert.row_table import RowTable
from longctx.mixers.mamba2 import Mamba2Config
from longctx.model.config import ModelConfig

_IGNORED_KEYS = (
    "chunk_size",
    "intermediate_size",
    "norm_before_gate",
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "rms_norm",
    "time_step_floor",
    "time_step_init_scheme",
    "time_step_max",
    "time_step_min",
    "time_step_rank",
    "time_step_scale",
)
"""Initialisation, chunk sizes, the dtype of the residual stream, and keys of published files for other programs."""


class Mamba2(Family):
    """A Mamba-2 mixer in each layer and no feed-forward."""

    model_type: ClassVar[str] = "mamba2"
    architecture: ClassVar[str] = "Mamba2ForCausalLM"
    letters: ClassVar[str] = Mamba2Config.letter
    ffns: ClassVar[tuple[str, ...]] = ("none",)

    def read(self, keys: Keys) -> dict[str, Any]:
        keys.only("hidden_act", "silu", "swish", why="the convolution and the gate use SiLU")
        keys.only("use_bias", False, why="projections have no bias")
        keys.ignore(*_IGNORED_KEYS)
        heads, head_dim = keys.integer("num_heads"), keys.integer("head_dim")
        dim, inner = keys.integer("hidden_size"), heads * head_dim
        if dim * keys.integer("expand", 2) != inner:
            keys.problems.append(f"expand: expand * hidden_size must be num_heads * head_dim = {inner}")
        dt_min, dt_max = self._dt_limits(keys)
        return {
            "layers": "M",
            "ffn": "none",
            "depth": keys.integer("num_hidden_layers"),
            "dim": dim,
            "vocab_size": keys.integer("vocab_size"),
            "norm_eps": keys.number("layer_norm_epsilon", 1e-5),
            "tie_embeddings": keys.flag("tie_word_embeddings", False),
            "mamba2": {
                "heads": heads,
                "head_dim": head_dim,
                "state_dim": keys.integer("state_size"),
                "groups": keys.integer("n_groups"),
                "conv": keys.integer("conv_kernel", 4),
                "conv_bias": keys.flag("use_conv_bias", True),
                "dt_min": dt_min,
                "dt_max": dt_max,
            },
        }

    def _dt_limits(self, keys: Keys) -> tuple[float, float | None]:
        limits = keys.raw("time_step_limit") or [0.0, math.inf]
        limits = limits if isinstance(limits, list) else [limits]
        # JSON has no infinity; transformers writes a table instead.
        infinite = [isinstance(x, dict) and x == {"__float__": "Infinity"} for x in limits]
        numbers = [math.inf if is_infinite else x for x, is_infinite in zip(limits, infinite, strict=True)]
        if len(numbers) != 2 or not all(type(x) in (int, float) for x in numbers):
            keys.problems.append(f"time_step_limit: {limits!r} is not a list of two numbers")
            return 0.0, None
        return float(numbers[0]), None if math.isinf(numbers[1]) else float(numbers[1])

    def write(self, model: ModelConfig) -> dict[str, Any]:
        layer = table_of(model, Mamba2Config).resolved(model.dim)
        assert layer.head_dim is not None
        return {
            "hidden_act": "silu",
            "use_bias": False,
            "num_hidden_layers": model.depth,
            "hidden_size": model.dim,
            "vocab_size": model.vocab_size,
            "layer_norm_epsilon": model.norm_eps,
            "tie_word_embeddings": model.tie_embeddings,
            "num_heads": layer.heads,
            "head_dim": layer.head_dim,
            "expand": max(1, layer.heads * layer.head_dim // model.dim),
            "state_size": layer.state_dim,
            "n_groups": layer.groups,
            "conv_kernel": layer.conv,
            "use_conv_bias": layer.conv_bias,
            "time_step_limit": [layer.dt_min, {"__float__": "Infinity"} if layer.dt_max is None else layer.dt_max],
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def table(self, model: ModelConfig, shapes: Mapping[str, torch.Size]) -> RowTable:
        table = RowTable(shapes)
        table.put("embedding.weight", "backbone.embeddings.weight")
        table.put("norm.weight", "backbone.norm_f.weight")
        if not model.tie_embeddings:
            table.put("head.weight", "lm_head.weight")
        names = {
            "inner.weight": "in_proj.weight",
            "decay.A_log": "A_log",
            "decay.dt_bias": "dt_bias",
            "skip.weight": "D",
            "norm.weight": "norm.weight",
            "out.weight": "out_proj.weight",
        }
        if table_of(model, Mamba2Config).conv_bias:
            names["conv.bias"] = "conv1d.bias"
        for layer in range(model.depth):
            theirs = f"backbone.layers.{layer}"
            table.put(f"blocks.{layer}.mixer_norm.weight", f"{theirs}.norm.weight")
            table.put(f"blocks.{layer}.mixer.conv.weight", f"{theirs}.mixer.conv1d.weight", conv=True)
            for ours, name in names.items():
                table.put(f"blocks.{layer}.mixer.{ours}", f"{theirs}.mixer.{name}")
        return table

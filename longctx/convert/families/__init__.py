"""Supported models of transformers, by `model_type`. To add one, add a file here and an entry in `FAMILIES`."""

from longctx.convert.families.base import Family
from longctx.convert.families.llama import Llama, Mixtral
from longctx.convert.families.mamba2 import Mamba2
from longctx.convert.families.minimax import MiniMax
from longctx.convert.families.qwen3_next import Qwen3Next

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llama(), Mixtral(), Mamba2(), Qwen3Next(), MiniMax())
}

__all__ = ["FAMILIES", "Family"]

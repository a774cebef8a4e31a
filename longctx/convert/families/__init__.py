"""The models of transformers that the built-in one can be, by `model_type`. A new one is a file here and a name."""

from longctx.convert.families.base import Family
from longctx.convert.families.llama import Llama, Mixtral
from longctx.convert.families.mamba2 import Mamba2
from longctx.convert.families.minimax import MiniMax
from longctx.convert.families.qwen3_next import Qwen3Next

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Llama(), Mixtral(), Mamba2(), Qwen3Next(), MiniMax())
}

__all__ = ["FAMILIES", "Family"]

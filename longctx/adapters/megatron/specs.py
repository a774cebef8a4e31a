"""Specs for `pretrain_gpt.py --spec longctx.adapters.megatron.specs NAME`, and for one's own.

    softmax                 Megatron's attention, over context-parallel ranks without TransformerEngine
    lightning, gla, ...     a stack of one mixer: every name of `longctx.mixers`
    lightning_hybrid        seven lightning layers to one of softmax attention (MiniMax-01)
    gated_deltanet_hybrid   three layers of the gated delta rule to one of softmax attention (Qwen3-Next)
    kda_hybrid              three of Kimi Delta Attention to one of softmax attention (Kimi Linear)
    mamba2_hybrid           seven Mamba-2 layers to one of softmax attention

Head counts and widths are those of Megatron's attention (`longctx.adapters.megatron.mixer.default_mixer`). For another
pattern or other mixers put `mine = layer_spec("LLLS", ...)` into a module of your own and name that.
"""

from collections.abc import Mapping

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from longctx.adapters.megatron.layer import TOKEN, Layer
from longctx.adapters.megatron.norms import Norm
from longctx.adapters.megatron.router import Choice
from longctx.mixers import MIXERS, MixerConfig
from longctx.mixers.head_mixture import HeadsMixConfig


def layer_spec(
    pattern: str,
    mixers: Mapping[str, MixerConfig] | None = None,
    heads: HeadsMixConfig | None = None,
    choice: Choice = TOKEN,
) -> ModuleSpec:
    """The spec of a stack whose layers follow a pattern of letters, again and again; `mixers`, `heads` and `choice` as
    in `longctx.adapters.megatron.layer.Layer`.

    Raises ValueError for a letter that there is not.
    """
    strange = sorted(set(pattern) - set(MIXERS))
    if strange or not pattern:
        raise ValueError(f"pattern: {pattern!r}; letters are {', '.join(sorted(MIXERS))}")
    return ModuleSpec(module=Layer, params={"pattern": pattern, "mixers": mixers, "heads": heads, "choice": choice})


def block_spec(
    spec: ModuleSpec, config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, with a final norm that takes sequence parallelism, for a `GPTModel` that one
    builds oneself without TransformerEngine and Apex; with either `GPTModel` takes the spec as it is."""
    layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm)


softmax = layer_spec("S")
lightning = layer_spec("L")
linear = layer_spec("B")
retention = layer_spec("R")
simple_gla = layer_spec("I")
mamba2 = layer_spec("M")
gla = layer_spec("G")
hgrn2 = layer_spec("H")
lightnet = layer_spec("N")
deltanet = layer_spec("D")
gated_deltanet = layer_spec("E")
kda = layer_spec("K")
lightning_hybrid = layer_spec("LLLLLLLS")
gated_deltanet_hybrid = layer_spec("EEES")
kda_hybrid = layer_spec("KKKS")
mamba2_hybrid = layer_spec("MMMMMMMS")

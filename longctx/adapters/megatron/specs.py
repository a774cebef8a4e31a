"""Layer specs for `pretrain_gpt.py --spec longctx.adapters.megatron.specs NAME`, and `layer_spec` for custom ones.

    softmax                 Megatron's attention over context-parallel ranks, without TransformerEngine
    lightning, gla, ...     one mixer in all layers: every name of `longctx.mixers`
    lightning_hybrid        7 lightning layers per softmax layer (MiniMax-01)
    gated_deltanet_hybrid   3 Gated DeltaNet layers per softmax layer (Qwen3-Next)
    kda_hybrid              3 Kimi Delta Attention layers per softmax layer (Kimi Linear)
    mamba2_hybrid           7 Mamba-2 layers per softmax layer

Head counts and widths are those of Megatron's attention (`longctx.adapters.megatron.mixer.default_mixer`). For another
pattern or other mixers, define `mine = layer_spec("LLLS", ...)` in your own module and pass that module to `--spec`.
"""

from collections.abc import Mapping

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from longctx.adapters.megatron.layer import TOKEN_ROUTER, Layer
from longctx.adapters.megatron.norms import Norm
from longctx.adapters.megatron.router import RouterConfig
from longctx.mixers import MIXERS, MixerConfig
from longctx.mixers.head_mixture import HeadMixtureConfig


def layer_spec(
    pattern: str,
    mixers: Mapping[str, MixerConfig] | None = None,
    heads: HeadMixtureConfig | None = None,
    router: RouterConfig = TOKEN_ROUTER,
) -> ModuleSpec:
    """Return the layer spec of a stack whose layers repeat a pattern of letters; `mixers`, `heads` and `router` as in
    `longctx.adapters.megatron.layer.Layer`.

    Raises ValueError for an unknown letter.
    """
    unknown = sorted(set(pattern) - set(MIXERS))
    if unknown or not pattern:
        raise ValueError(f"pattern is {pattern!r}: expected one or more of the letters {', '.join(sorted(MIXERS))}")
    return ModuleSpec(module=Layer, params={"pattern": pattern, "mixers": mixers, "heads": heads, "router": router})


def block_spec(
    spec: ModuleSpec, config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Return the block spec of one pipeline stage, with a final norm that supports sequence parallelism.

    For a `GPTModel` of your own without TransformerEngine and Apex; with either, pass `spec` itself to `GPTModel`.
    """
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

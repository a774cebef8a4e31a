"""Megatron's `TransformerLayer` with a longctx mixer, selected by the global layer number (over all pipeline stages).

A pattern of letters, as in a recipe's `model.layers`, selects the mixer: `S` is Megatron's own self-attention, with its
projections, norms and rotary positions, around attention over context-parallel ranks; any other letter is a mixer
(`longctx.adapters.megatron.mixer`). The rest of the layer follows Megatron's config: norms, linear layers
(TransformerEngine's with `transformer_impl = "transformer_engine"`), feed-forward or mixture of experts.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from longctx.adapters.megatron.attention import SoftmaxAttention
from longctx.adapters.megatron.mixer import TokenMixer
from longctx.adapters.megatron.norms import Norm
from longctx.adapters.megatron.router import AttentionRouter, GraphRouter, RouterConfig, SimilarityRouter
from longctx.mixers import MIXERS, MixerConfig
from longctx.mixers.head_mixture import HeadMixtureConfig

SOFTMAX, TOKEN_ROUTER = "S", RouterConfig()


class Layer(TransformerLayer):  # type: ignore[misc]
    """One layer of a stack with a pattern: `ModuleSpec(module=Layer, params={"pattern": "LLLS"})`."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules | None = None,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: Any = None,
        vp_stage: int | None = None,
        *,
        pattern: str,
        mixers: Mapping[str, MixerConfig] | None = None,
        heads: HeadMixtureConfig | None = None,
        router: RouterConfig = TOKEN_ROUTER,
        **newer: Any,
    ) -> None:
        """`layer_number` counts from 1 within the pipeline stage. `mixers`: mixer configs by letter, instead of those
        derived from Megatron's config (`default_mixer`); with one for `S`, that layer is longctx's, rotary positions
        included. `heads`: a mixture of heads, for the mixers that it names. `router`: the router of experts, if any.

        Raises ValueError for an unknown letter in the pattern, and what the mixers raise.
        """
        number = layer_number
        if not newer.get("is_mtp_layer") and newer.get("add_layer_offset", True):
            group = None if pg_collection is None else getattr(pg_collection, "pp", None)
            rank = parallel_state.get_pipeline_model_parallel_rank() if group is None else group.rank()
            number += get_transformer_layer_offset(config, vp_stage, rank)
        letters = {letter_of(pattern, n) for n in range(1, config.num_layers + 1)}
        if len(letters) > 1 or not all(MIXERS[letter].same_in_all_layers for letter in letters):
            # Layers with different parameters are saved under their own layer numbers, not as slices of one tensor.
            config.hetereogenous_dist_checkpoint = True
        chosen = submodules or layer_submodules(config, number, pattern, mixers or {}, heads, router)
        super().__init__(config, chosen, layer_number, hidden_dropout, pg_collection, vp_stage, **newer)
        moe_router = getattr(self.mlp, "router", None)
        self.graph_router = moe_router if isinstance(moe_router, GraphRouter) else None
        reads_attention = router.kind == "attention"
        self.router_attention = getattr(self.self_attention, "core_attention", None) if reads_attention else None
        if self.graph_router is not None and self.router_attention is not None:
            self.router_attention.serves_router = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's forward; passes the batch's documents to the graph router."""
        if self.graph_router is None:
            return super().forward(*args, **kwargs)
        self.graph_router.packed_seq_params = kwargs.get("packed_seq_params")
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.graph_router.packed_seq_params = self.graph_router.attention_average = None
            if self.router_attention is not None:
                self.router_attention.attention_average = None

    def _forward_mlp(self, *args: Any, **kwargs: Any) -> Any:
        if self.graph_router is not None and self.router_attention is not None:
            self.graph_router.attention_average = self.router_attention.attention_average
        return super()._forward_mlp(*args, **kwargs)


def letter_of(pattern: str, layer_number: int) -> str:
    """Return the letter of a layer, counted from 1; the pattern repeats."""
    return pattern[(layer_number - 1) % len(pattern)]


def layer_submodules(
    config: TransformerConfig,
    layer_number: int,
    pattern: str,
    mixers: Mapping[str, MixerConfig],
    heads: HeadMixtureConfig | None,
    router: RouterConfig,
) -> TransformerLayerSubmodules:
    """Build the submodules of a layer: Megatron's spec with the mixer, norms and router replaced."""
    transformer_engine = config.transformer_impl == "transformer_engine"
    options: dict[str, Any] = {
        "num_experts": config.num_moe_experts if has_experts(config, layer_number) else None,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**options)
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization, **options)
    parts = spec.submodules
    letter = letter_of(pattern, layer_number)
    mixer = mixers.get(letter)
    routed = heads if heads is not None and MIXERS[letter].name in heads.mixers else None
    if letter == SOFTMAX and mixer is None and routed is None:
        parts.self_attention.submodules.core_attention = SoftmaxAttention
    else:
        parts.self_attention = ModuleSpec(
            module=TokenMixer, params={"mixer": letter if mixer is None else mixer, "heads": routed}
        )
        if transformer_engine:
            # TransformerEngine's attention fuses its norm into its projection.
            from megatron.core.extensions.transformer_engine import TENorm

            parts.input_layernorm = TENorm
    if options["num_experts"] is not None and router.kind != "token":
        router.check(config, letter)
        # A ModuleSpec in 0.16, a partial function later.
        experts = parts.mlp.submodules if isinstance(parts.mlp, ModuleSpec) else parts.mlp.keywords["submodules"]
        experts.router = AttentionRouter
        if router.kind == "similarity":
            experts.router = partial(SimilarityRouter, width=router.similarity_dim, temperature=router.temperature)
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        if getattr(parts, name) is WrappedTorchNorm:
            setattr(parts, name, Norm)
    return parts


def has_experts(config: TransformerConfig, layer_number: int) -> bool:
    """Return whether a layer, counted from 1, has experts by `num_moe_experts` and `moe_layer_freq`."""
    if config.num_moe_experts is None:
        return False
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return (layer_number - 1) % frequency == 0
    return bool(frequency[layer_number - 1])

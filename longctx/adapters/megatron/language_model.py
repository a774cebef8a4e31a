"""Megatron's `GPTModel` for a recipe's `[model]`, with a tiled, vocab-parallel loss.

Every layer is a `longctx.adapters.megatron.layer.Layer` with the recipe's mixers, softmax attention included, so that
positions, documents and token order follow longctx's layouts. Embedding, norms, feed-forwards and head, and their
tensor parallelism, are Megatron's.
"""

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from longctx.adapters.megatron.specs import block_spec, layer_spec
from longctx.mixers import MIXERS
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from longctx.parallel.loss import vocab_parallel_cross_entropy
from longctx.parallel.mesh import Axis


class LanguageModel(GPTModel):  # type: ignore[misc]
    """A pipeline stage of the model; the last one returns losses."""

    loss_tile = 4096
    """Tokens whose logits are in memory at one time."""

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **unused: Any) -> Any:
        """From `[s, b, h]` compute the negative log likelihoods (nats) of labels `[b, s]`: (sum, per token).

        Only the sum is differentiable; it is not averaged.
        """
        del unused
        if not self.post_process:
            return hidden_states
        assert labels is not None
        tp = Axis.from_group(self.pg_collection.tp)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        x = hidden_states
        if tp.size > 1 and self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=tp.group)
        elif tp.size > 1:
            x = copy_to_tensor_model_parallel_region(x, group=tp.group)
        rows = x.transpose(0, 1).flatten(0, 1)
        total, nll = vocab_parallel_cross_entropy(rows, weight, labels.flatten(), self.loss_tile, tp)
        return total, nll.view(labels.shape)


def transformer_config(model: ModelConfig, **engine: Any) -> TransformerConfig:
    """Return Megatron's config for a model with dense feed-forwards; `engine`: parallel sizes, precision and
    recomputation."""
    tp = engine["tensor_model_parallel_size"]
    table = model.feed_forward(0)
    assert isinstance(table, SwigluConfig)
    return TransformerConfig(
        num_layers=model.depth,
        hidden_size=model.dim,
        # For Megatron's own attention, which no layer uses.
        num_attention_heads=tp,
        kv_channels=model.dim,
        ffn_hidden_size=table.width(model.dim),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        # The weights are set after the model is built and moved to the device.
        perform_initialization=False,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        **engine,
    )


def build_language_model(
    model: ModelConfig, vocab_size: int, length: int, config: TransformerConfig, *, first: bool, last: bool
) -> LanguageModel:
    """Build this rank's shard of a pipeline stage, which may be the `first` and the `last`, on the CPU, uninitialised.

    `length`: tokens per sequence. Raises ValueError if heads are not divisible by the tensor-parallel ranks.
    """
    mixers = {letter: getattr(model, MIXERS[letter].name) for letter in set(model.pattern)}
    spec = layer_spec(model.pattern, mixers, model.heads)
    return LanguageModel(
        config,
        block_spec(spec, config),
        vocab_size,
        length,
        pre_process=first,
        post_process=last,
        position_embedding_type="none",
        share_embeddings_and_output_weights=model.tie_embeddings,
    )

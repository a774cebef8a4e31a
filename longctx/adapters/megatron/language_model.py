"""Megatron's GPT of a recipe's `[model]`, with the loss of its head in tiles.

Every layer is `longctx.adapters.megatron.layer.Layer` with the mixers of the recipe, softmax attention included, so
that positions, documents and the order of tokens over ranks are those of our layouts; embedding, norms, feed-forwards,
head, and what divides them over ranks, are Megatron's.
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
from longctx.parallel.loss import divided_cross_entropy
from longctx.parallel.mesh import Axis


class LanguageModel(GPTModel):  # type: ignore[misc]
    """A stage of the pipeline; the last one gives losses."""

    loss_tile = 4096
    """Tokens whose logits exist at one time."""

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None, **unused: Any) -> Any:
        """`[s, b, h]` to the negative log likelihoods (nats) of labels `[b, s]`: their sum, differentiable, and each.

        The gradients of the sum are not divided by anything.
        """
        del unused
        if not self.post_process:
            return hidden_states
        assert labels is not None
        tp = Axis.of(self.pg_collection.tp)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        x = hidden_states
        if tp.size > 1 and self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=tp.group)
        elif tp.size > 1:
            x = copy_to_tensor_model_parallel_region(x, group=tp.group)
        rows = x.transpose(0, 1).flatten(0, 1)
        total, nll = divided_cross_entropy(rows, weight, labels.flatten(), self.loss_tile, tp)
        return total, nll.view(labels.shape)


def transformer_config(model: ModelConfig, **engine: Any) -> TransformerConfig:
    """Megatron's configuration of a model of dense feed-forwards; `engine`: parallel sizes, precision and what is
    recomputed."""
    tp = engine["tensor_model_parallel_size"]
    table = model.feed_forward(0)
    assert isinstance(table, SwigluConfig)
    return TransformerConfig(
        num_layers=model.depth,
        hidden_size=model.dim,
        # Of Megatron's own attention, which no layer has.
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
        # What it begins with is filled in when it is built, and it is then moved.
        perform_initialization=False,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        **engine,
    )


def build(
    model: ModelConfig, rows: int, length: int, config: TransformerConfig, *, first: bool, last: bool
) -> LanguageModel:
    """This rank's part of a model with `rows` in its vocabulary for sequences of `length` tokens: of the pipeline's
    stage, which may be the `first` and the `last`. On the CPU; its weights are not drawn.

    Raises ValueError where heads do not divide over the tensor-parallel ranks.
    """
    used = {letter: getattr(model, MIXERS[letter].name) for letter in set(model.pattern)}
    spec = layer_spec(model.pattern, used, model.heads)
    return LanguageModel(
        config,
        block_spec(spec, config),
        rows,
        length,
        pre_process=first,
        post_process=last,
        position_embedding_type="none",
        share_embeddings_and_output_weights=model.tie_embeddings,
    )

"""Graph-of-tokens routers for Megatron's `MoELayer`: similarity-aware and attention-aware (`longctx.moe.token_graph`).

They replace `TopKRouter`: routing scores are averaged over the earlier tokens of each token's document; top-k,
auxiliary losses and dispatch remain Megatron's. Megatron receives the logarithms of the averages as logits, whose
softmax is the averages again (with sigmoid scores, their logit).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.adapters.megatron.layouts import Groups, batch_layout
from longctx.moe.token_graph import similarity_aware
from longctx.parallel.collectives import all_reduce

RouterKind = Literal["token", "similarity", "attention"]

AttentionAverage = Callable[[Tensor], Tensor]
"""Averages a rank's scores `[b, s/cp, E]` by a layer's attention weights, the mean over its local heads."""


@dataclass(frozen=True)
class RouterConfig:
    """The router of experts: each token by its own scores, or by scores averaged over similar or attended tokens."""

    kind: RouterKind = "token"
    similarity_dim: int = 64
    """Width of the queries and keys that compare tokens, for `similarity`."""
    temperature: float = 1.0
    """Temperature of that comparison: the lower, the more weight on the most similar tokens."""

    def check(self, config: TransformerConfig, letter: str) -> None:
        """Raise ValueError for options that would drop the router's gradient or bypass it, and if a layer (its pattern
        `letter`) has no attention for the router."""
        recomputed = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        lost = sorted({"moe", "core_attn"} & set(recomputed)) if self.kind == "attention" else []
        if lost:
            raise ValueError(
                f"recompute_modules: {', '.join(lost)} would drop the router's gradient through attention; recompute "
                "whole layers (recompute_granularity 'full'), or other modules"
            )
        if getattr(config, "overlap_moe_expert_parallel_comm", False):
            raise ValueError(f"overlap_moe_expert_parallel_comm: bypasses the router {self.kind!r}; disable it")
        if self.kind == "attention" and letter != "S":
            raise ValueError(f"router 'attention': a layer {letter!r} has no softmax attention; use S in its pattern")


class GraphRouter(TopKRouter):  # type: ignore[misc]
    """Base class: averages the scores over all tokens of a context-parallel rank, then takes its tp rank's slice."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **newer: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **newer)
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"moe_router_score_function is {self.score_function!r}: expected 'softmax' or 'sigmoid'")
        self.groups = Groups.from_collection(config, pg_collection)
        self.sequence_sharded = bool(config.sequence_parallel) and self.groups.tp.size > 1
        """Whether tensor-parallel ranks hold slices of the sequence (sequence parallelism)."""
        self.packed_seq_params: PackedSeqParams | None = None
        """The documents of the current batch; set by the layer."""
        self.attention_average: AttentionAverage | None = None
        """The average by the layer's softmax attention; set by the layer."""

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002 - Megatron's name
        """Compute logits `[s, b, E]` from `[s, b, h]`."""
        logits = super().gating(input)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.score_function == "softmax":
            return self.average_scores(torch.softmax(wide, dim=-1), input).log().contiguous()
        return torch.logit(self.average_scores(torch.sigmoid(wide), input)).contiguous()

    def average_scores(self, scores: Tensor, x: Tensor) -> Tensor:
        """Average scores `[s, b, E]` over the graph of tokens; x `[s, b, h]` is the layer's input."""
        raise NotImplementedError

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Gather the rows of this context-parallel rank, `[s/cp, b, ...]`, from the tensor-parallel ranks' slices."""
        return gather_from_sequence_parallel_region(x, group=self.groups.tp.group) if self.sequence_sharded else x

    def slice_sequence(self, x: Tensor) -> Tensor:
        """Take this tensor-parallel rank's slice of the rows."""
        return x.chunk(self.groups.tp.size)[self.groups.tp.rank] if self.sequence_sharded else x


class SimilarityRouter(GraphRouter):
    """Averages scores over similar tokens, with weights `softmax_j(u_i^T W_a^T W_b u_j / tau)`."""

    def __init__(
        self, config: TransformerConfig, pg_collection: Any = None, *, width: int, temperature: float, **newer: Any
    ) -> None:
        super().__init__(config, pg_collection, **newer)
        self.scale = 1 / (temperature * width**0.5)
        matrix = torch.empty(width, config.hidden_size)
        # W_a = W_b at initialisation: each token is most similar to itself (longctx.model.moe.Similarity).
        nn.init.normal_(matrix, std=config.hidden_size**-0.5)
        self.similarity = nn.Parameter(matrix.repeat(2, 1).to(config.params_dtype))
        self.similarity.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def average_scores(self, scores: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        q, k = F.linear(x, self.similarity.to(x.device)).chunk(2, dim=-1)
        r, q, k = (self.gather_sequence(rows).transpose(0, 1) for rows in (scores, q, k))
        batch = batch_layout(r.shape[1], self.packed_seq_params, self.groups, "all-gather")
        r, q, k = batch.to_layout(r, q, k)
        out = batch.to_megatron(similarity_aware(r, q, k, batch.layout, self.scale))
        return self.slice_sequence(out.transpose(0, 1))


class AttentionRouter(GraphRouter):
    """Averages scores by the attention weights of the layer's own heads."""

    def average_scores(self, scores: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        del x
        if self.attention_average is None:
            raise ValueError("router 'attention': its layer has to be a longctx.adapters.megatron.layer.Layer")
        tp = self.groups.tp
        # Each tensor-parallel rank has a part of the heads.
        r = self.gather_sequence(scores)
        if tp.size > 1 and not self.sequence_sharded:
            r = copy_to_tensor_model_parallel_region(r, group=tp.group)
        out = self.attention_average(r.transpose(0, 1)).transpose(0, 1) / tp.size
        if tp.size == 1:
            return out
        if self.sequence_sharded:
            return self.slice_sequence(_SumOverRanks.apply(out, tp.group))  # type: ignore[no-untyped-call]
        return reduce_from_tensor_model_parallel_region(out, group=tp.group)


class _SumOverRanks(torch.autograd.Function):
    """Sums over ranks that use different rows of the sum, so the backward pass sums over ranks too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None

"""Routers of Megatron's own mixture-of-experts layer by which tokens choose together (`longctx.moe.token_graph`).

They take the place of `TopKRouter`: its scores are averaged over the tokens of a document up to each, and what follows,
the choice, its losses and the dispatch, is Megatron's. It is given the logarithms of the averages as logits, whose
softmax (or the like with sigmoid scores) gives the averages back.
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

from longctx.adapters.megatron.layouts import Groups, placed
from longctx.moe.token_graph import similarity_aware
from longctx.parallel.collectives import all_reduce

Graph = Literal["token", "similarity", "attention"]

Attend = Callable[[Tensor], Tensor]
"""The attention of a layer's own heads, the mean of them, of a rank's scores `[b, s/cp, E]`."""


@dataclass(frozen=True)
class Choice:
    """How tokens choose experts: each by its own scores, or together."""

    by: Graph = "token"
    similarity_dim: int = 64
    """Width of the queries and keys by which tokens are compared, with `similarity`."""
    temperature: float = 1.0
    """Of that comparison: the lower, the more only what is most alike counts."""

    def check(self, config: TransformerConfig, letter: str) -> None:
        """Raise ValueError for what would lose gradients or be passed by, and for attention that there is not."""
        again = config.recompute_modules or [] if config.recompute_granularity == "selective" else []
        lost = sorted({"moe", "core_attn"} & set(again)) if self.by == "attention" else []
        if lost:
            raise ValueError(
                f"recompute_modules: {', '.join(lost)} would lose the router's gradient through attention; recompute "
                "whole layers (recompute_granularity 'full'), or other modules"
            )
        if getattr(config, "overlap_moe_expert_parallel_comm", False):
            raise ValueError(f"overlap_moe_expert_parallel_comm: passes by the router {self.by!r}; switch it off")
        if self.by == "attention" and letter != "S":
            raise ValueError(
                f"router 'attention': a layer {letter!r} has no attention to read; its pattern has to be S"
            )


class GraphRouter(TopKRouter):  # type: ignore[misc]
    """What both have in common: scores of all tokens of a context-parallel rank, averaged, and the rank's own again."""

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **newer: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **newer)
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(f"moe_router_score_function: {self.score_function!r}; there are softmax and sigmoid")
        self.groups = Groups.of(config, pg_collection)
        self.divided = bool(config.sequence_parallel) and self.groups.tp.size > 1
        """Whether tensor-parallel ranks have slices of the sequence."""
        self.packed: PackedSeqParams | None = None
        """The documents of the batch that is computed; the layer says."""
        self.attend: Attend | None = None
        """The attention of its softmax layer; the layer says."""

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002 - Megatron's name
        """`[s, b, h]` to logits `[s, b, E]`."""
        logits = super().gating(input)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.score_function == "softmax":
            return self.averaged(torch.softmax(wide, dim=-1), input).log().contiguous()
        return torch.logit(self.averaged(torch.sigmoid(wide), input)).contiguous()

    def averaged(self, scores: Tensor, x: Tensor) -> Tensor:
        """Scores `[s, b, E]` averaged over the graph, x `[s, b, h]` being the layer's input."""
        raise NotImplementedError

    def whole(self, x: Tensor) -> Tensor:
        """The rows of this context-parallel rank, `[s/cp, b, ...]`, from a tensor-parallel slice of them."""
        return gather_from_sequence_parallel_region(x, group=self.groups.tp.group) if self.divided else x

    def own(self, x: Tensor) -> Tensor:
        """This tensor-parallel rank's slice again."""
        return x.chunk(self.groups.tp.size)[self.groups.tp.rank] if self.divided else x


class SimilarityRouter(GraphRouter):
    """Scores averaged over tokens that are like each: `softmax_j(u_i^T W_a^T W_b u_j / tau)`."""

    def __init__(
        self, config: TransformerConfig, pg_collection: Any = None, *, width: int, temperature: float, **newer: Any
    ) -> None:
        super().__init__(config, pg_collection, **newer)
        self.scale = 1 / (temperature * width**0.5)
        one = torch.empty(width, config.hidden_size)
        # Equal at first: a token is then most like itself (longctx.model.moe.Similarity).
        nn.init.normal_(one, std=config.hidden_size**-0.5)
        self.similarity = nn.Parameter(one.repeat(2, 1).to(config.params_dtype))
        self.similarity.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def averaged(self, scores: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        q, k = F.linear(x, self.similarity.to(x.device)).chunk(2, dim=-1)
        r, q, k = (self.whole(each).transpose(0, 1) for each in (scores, q, k))
        where = placed(r.shape[1], self.packed, self.groups, "all-gather")
        r, q, k = where.taken(r, q, k)
        out = where.given(similarity_aware(r, q, k, where.layout, self.scale))
        return self.own(out.transpose(0, 1))


class AttentionRouter(GraphRouter):
    """Scores averaged by the attention of the layer's own heads."""

    def averaged(self, scores: Tensor, x: Tensor) -> Tensor:
        """See the class."""
        del x
        if self.attend is None:
            raise ValueError("router 'attention': there is no attention to read; use longctx.adapters.megatron.layer")
        tp = self.groups.tp
        # Each tensor-parallel rank has some of the heads.
        r = self.whole(scores) if self.divided else scores
        if tp.size > 1 and not self.divided:
            r = copy_to_tensor_model_parallel_region(r, group=tp.group)
        out = self.attend(r.transpose(0, 1)).transpose(0, 1) / tp.size
        if tp.size == 1:
            return out
        if self.divided:
            return self.own(_SummedOver.apply(out, tp.group))  # type: ignore[no-untyped-call]
        return reduce_from_tensor_model_parallel_region(out, group=tp.group)


class _SummedOver(torch.autograd.Function):
    """The sum over ranks that then use different rows of it: gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_reduce(x.contiguous().clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grads[0].contiguous().clone(), ctx.group), None

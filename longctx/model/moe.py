"""Mixture of experts (MoE): dropless token-choice routing in float32, SwiGLU experts, optional shared experts."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.attention.block import CAUSAL_MASK
from longctx.kernels.routed.swiglu import grouped_swiglu
from longctx.layers.basic import Linear, SelfInitialised
from longctx.layers.cache import Cache, cached_attention
from longctx.layers.output import Attend, Output
from longctx.layers.router import Router
from longctx.model.ffn import FeedForward, FeedForwardConfig, Swiglu
from longctx.moe.expert_router import Score, TokenChoice, balancing_step, choose_experts, scores
from longctx.moe.experts import mixture_of_experts
from longctx.moe.noise import jitter_factors
from longctx.moe.token_graph import one_head_schedule, similarity_aware, similarity_estimates
from longctx.parallel.attention.cost_model import ScheduleChoice, fitting
from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis

SIMILARITY_DIM = 64
"""Default width of a similarity-aware router's keys, at most the model's width."""


class MoeConfig(FeedForwardConfig):
    """`[model.moe]`: a mixture of SwiGLU experts, dropless by default."""

    name: ClassVar[str] = "moe"

    experts: Integer = Field(gt=0)
    """Number of routed experts."""
    active: Integer = Field(gt=0)
    """Active routed experts per token (top-k)."""
    hidden: Integer = Field(gt=0)
    """Hidden width of each expert."""
    shared: Integer = Field(default=0, ge=0)
    """Number of shared experts, which all tokens use: computed as one layer of width `shared * hidden`."""
    shared_hidden: Integer | None = Field(default=None, gt=0)
    """Hidden width of the shared layer. Default: `shared * hidden`."""
    shared_gate: bool = False
    """Multiply the shared layer's output by the sigmoid of a projection of its input, one number per token, as in
    Qwen's models."""
    router: Literal["token", "similarity", "attention"] = "token"
    """Scores by which a token chooses: its own (`token`), or an average of those of its document up to it, weighted by
    a learned similarity of tokens (`similarity`) or by the attention of the block's softmax layer, averaged over heads
    (`attention`, which needs a softmax mixer in every layer with experts)."""
    similarity_dim: Integer | None = Field(default=None, gt=0)
    """Width of the queries and keys of the router `similarity`. Default: 64, at most `dim`."""
    temperature: float | None = Field(default=None, gt=0)
    """Temperature of the router `similarity`, whose weights are the softmax of
    `q k / (temperature * sqrt(similarity_dim))`. Default: 1."""
    score: Score = "softmax"
    """Function that maps the router's logits to scores."""
    normalize: bool = True
    """Divide a token's weights by their sum. With one active expert every weight is then 1, and the router learns only
    from the auxiliary losses (`balance`, `z`)."""
    scale: float = Field(default=1.0, gt=0)
    """Factor of the sum of the routed experts."""
    groups: Integer = Field(default=1, gt=0)
    """Number of groups of consecutive experts, for group-limited routing; a divisor of `experts`."""
    active_groups: Integer = Field(default=1, gt=0)
    """Groups from which a token chooses its experts."""
    balance: float = Field(default=0.01, ge=0)
    """Coefficient of the load-balancing loss."""
    z: float = Field(default=0.0, ge=0)
    """Coefficient of the router's z-loss, which keeps logits small; usually 1e-3 if used."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Step size of the load-balancing bias, which is added to scores for the choice only and adjusted after each step
    (auxiliary-loss-free balancing); usually 1e-3 if used."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiply the router's input in training by random factors between `1 - jitter` and `1 + jitter`."""
    capacity: float | None = Field(default=None, gt=0)
    """Capacity factor: the most choices per expert and sequence in training, as a multiple of the mean; later choices
    are dropped. Default: dropless."""

    def problems(self) -> list[str]:
        problems = []
        if self.active > self.experts:
            problems.append(f"active: {self.active} of {self.experts} experts")
        if self.experts % self.groups:
            problems.append(f"groups: {self.groups} groups do not divide {self.experts} experts")
        elif self.active_groups > self.groups:
            problems.append(f"active_groups: {self.active_groups} of {self.groups} groups")
        elif self.active > self.experts // self.groups * self.active_groups:
            available = self.experts // self.groups * self.active_groups
            have = f"{self.active_groups} groups have {available} experts"
            problems.append(f"active_groups: {have}, fewer than active = {self.active}")
        if not self.shared:
            is_set = {"shared_hidden": self.shared_hidden is not None, "shared_gate": self.shared_gate}
            problems += [f"{key}: there are no shared experts (shared = 0); remove it" for key in is_set if is_set[key]]
        if self.router != "similarity":
            problems += [
                f"{key}: only for the router 'similarity', and this is {self.router!r}; remove it"
                for key in ("similarity_dim", "temperature")
                if getattr(self, key) is not None
            ]
        return problems

    @property
    def needs_attention(self) -> bool:
        return self.router == "attention"

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]] | None:
        return ("attention", fitting(1, size, ulysses)) if self.router == "similarity" else None

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared layer; 0 if there is none."""
        return self.shared and (self.shared_hidden or self.shared * self.hidden)

    def resolved(self, dim: int) -> "MoeConfig":
        return self.model_copy(update={"shared": min(self.shared, 1), "shared_hidden": self.shared_width or None})

    @property
    def rule(self) -> TokenChoice:
        """The routing rule."""
        return TokenChoice(
            active=self.active,
            score=self.score,
            normalize=self.normalize,
            scale=self.scale,
            groups=self.groups,
            active_groups=self.active_groups,
            capacity=self.capacity,
            balance=self.balance,
            z=self.z,
        )

    def shrunk(self) -> "MoeConfig":
        experts = min(self.experts, 8)
        groups = math.gcd(self.groups, experts)
        active_groups = min(self.active_groups, groups)
        changes = {
            "experts": experts,
            "groups": groups,
            "active_groups": active_groups,
            "active": min(self.active, experts // groups * active_groups),
            "hidden": 16,
            "shared": min(self.shared, 1),
            "shared_hidden": 24 if self.shared_hidden else None,
            "similarity_dim": 8 if self.router == "similarity" else None,
        }
        return self.model_copy(update=changes)

    def build(self, dim: int, layer: int, depth: int) -> "MixtureOfExperts":
        return MixtureOfExperts(self, dim, layer, depth)


class Similarity(SelfInitialised):
    """Similarity of tokens, `u_i^T W_a^T W_b u_j / tau` (`longctx.moe.token_graph`), with tau = temperature sqrt(K).

    W_a and W_b are initialised equal, so that a token is most similar to itself at first and its averaged scores are
    close to its own: with independent matrices all tokens would start with the same average and the same experts.
    """

    def __init__(self, dim: int, width: int, temperature: float) -> None:
        super().__init__()
        self.width = width
        """K."""
        self.scale = 1 / (temperature * math.sqrt(width))
        self.weight = nn.Parameter(torch.empty(2 * width, dim))
        """W_a above W_b."""
        self.reset_parameters()

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return the initial value: one matrix from N(0, 1 / dim), twice."""
        return (torch.randn(self.width, shape[1], generator=generator) * shape[1] ** -0.5).repeat(2, 1)

    def forward(self, u: Tensor, r: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """Average scores r `[B, T_local, E]` by the similarity of tokens u `[B, T_local, D]`, cached ones included."""
        q, k = F.linear(u, self.weight).chunk(2, dim=-1)
        if cache is None:
            return similarity_aware(r, q, k, layout, self.scale)
        q, k, values = (x.to(r.dtype)[:, :, None] for x in (q, k, r))
        out, _ = cached_attention(q, k, values, layout, self.scale, CAUSAL_MASK, cache.router_kv)
        return out[:, :, 0]

    def flops(self, layout: Layout, experts: int) -> int:
        """Multiplications and additions of the projections and, per visible pair of tokens, a score and a weighted
        sum."""
        return 2 * layout.local_length * self.weight.numel() + 2 * (self.width + experts) * score_elements(layout)


class Experts(nn.Module):
    """Weights of the experts; under expert parallelism, of this rank's experts."""

    def __init__(self, count: int, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.count = count
        """Number of experts over all ranks."""
        self.gate_up = nn.Parameter(torch.empty(count, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(count, dim, hidden))
        self.stds = {"gate_up": dim**-0.5, "down": hidden**-0.5 * (2 * depth) ** -0.5}
        """Standard deviation of each matrix at initialisation; experts are drawn one by one."""
        self.axis = Axis()
        """The expert-parallel ranks."""
        self.tile: int | None = None
        """Rows per tile of hidden activations, as `FeedForward.tile`."""

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Compute this rank's experts for rows `[N, D]` sorted by expert; `ends` is the row after each one's last."""
        # Here, so that reading a recipe does not import it: a second of every command that does.
        from torch.distributed.tensor import DTensor

        gate_up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (self.gate_up, self.down))
        with torch.autocast(rows.device.type, enabled=False):
            return grouped_swiglu(rows, ends, gate_up.to(rows.dtype), down.to(rows.dtype), self.tile)

    @property
    def flops_of_one(self) -> int:
        """Forward multiplications and additions for one token in one expert."""
        return 2 * (self.gate_up.numel() + self.down.numel()) // self.count


class MixtureOfExperts(FeedForward):
    """`sum_e w_e(x) FFN_e(x)` over each token's experts, plus `FFN_shared(x)`, optionally times `sigmoid(x W)`."""

    bias: Tensor | None

    def __init__(self, config: MoeConfig, dim: int, layer: int, depth: int) -> None:
        super().__init__()
        self.rule, self.layer = config.rule, layer
        self.bias_rate, self.jitter = config.bias_rate, config.jitter
        self.router = Router(dim, config.experts)
        self.attention_channels = config.experts if config.needs_attention else 0
        self.similarity: Similarity | None = None
        if config.router == "similarity":
            width = config.similarity_dim or min(SIMILARITY_DIM, dim)
            self.similarity = Similarity(dim, width, 1.0 if config.temperature is None else config.temperature)
        self.experts = Experts(config.experts, dim, config.hidden, depth)
        self.shared = Swiglu(dim, config.shared_width, depth) if config.shared else None
        self.shared_gate = Linear(dim, 1) if config.shared_gate else None
        self.register_buffer("bias", torch.zeros(config.experts) if config.bias_rate else None)

    def reset_buffers(self) -> None:
        """Initialise the load-balancing bias."""
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()

    @property
    def tile(self) -> int | None:
        """Tokens per tile of hidden activations (`FeedForward.tile`)."""
        return self.experts.tile

    @tile.setter
    def tile(self, tile: int | None) -> None:
        self.experts.tile = tile
        if self.shared is not None:
            self.shared.tile = tile

    def forward(self, x: Tensor, layout: Layout, attend: Attend | None = None, cache: Cache | None = None) -> Output:
        """Compute the layer for x `[B, T_local, D]`; the shape stays. 0 for padding without shared experts."""
        router_input = x
        if self.training and self.jitter:
            router_input = x * jitter_factors(layout, self.jitter, x.shape, self.layer, x.device).to(x.dtype)
        logits = self.router(router_input)
        p = scores(logits, self.rule.score)
        if self.similarity is not None:
            p = self.similarity(router_input, p, layout, cache)
        elif self.attention_channels:
            if attend is None:
                raise ValueError(f"experts of layer {self.layer}: the router 'attention' needs the argument `attend`")
            p = attend(p, cache)
        rule = self.rule if self.training else replace(self.rule, capacity=None)
        routing = choose_experts(logits, p, rule, layout, bias=self.bias)
        out = mixture_of_experts(x, routing, self.experts.count, self.experts, self.experts.axis)
        if self.shared is not None:
            shared = self.shared(x, layout)
            out = out + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return Output(out, routing.report)

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        """Update the load-balancing bias, if there is one, from a step's choices `counts [E]` over all ranks."""
        if self.bias is not None:
            self.bias.copy_(balancing_step(self.bias, counts, self.bias_rate))

    @property
    def flops_per_token(self) -> int:
        layers = (self.shared, self.shared_gate)
        shared = sum(layer.flops_per_token for layer in layers if layer is not None)
        return self.router.flops_per_token + self.rule.active * self.experts.flops_of_one + shared

    def flops(self, layout: Layout) -> int:
        graph = 0 if self.similarity is None else self.similarity.flops(layout, self.experts.count)
        return super().flops(layout) + graph

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> ScheduleChoice | None:
        """Describe the schedule of a similarity-aware router, if the layout leaves the choice open ("auto")."""
        del dtype  # queries and keys are cast to the scores' float32
        if self.similarity is None or layout.size == 1 or one_head_schedule(layout) != "auto":
            return None
        ranked = similarity_estimates(layout, self.similarity.width, self.experts.count, torch.float32)
        return ScheduleChoice.of(ranked)

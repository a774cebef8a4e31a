"""Mixture of experts in the place of a feed-forward: a router in float32, SwiGLU experts, perhaps shared ones."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from longctx.config import Integer
from longctx.kernels.routed.swiglu import grouped_swiglu
from longctx.layers.basic import Linear, SelfInitialised
from longctx.layers.cache import Cache, attend
from longctx.layers.output import Attend, Output
from longctx.layers.router import Router
from longctx.model.ffn import FeedForward, FeedForwardConfig, Swiglu
from longctx.moe.expert_router import Score, TokenChoice, balancing_step, choose_experts, scores
from longctx.moe.experts import mixture_of_experts
from longctx.moe.noise import around_one
from longctx.moe.token_graph import one_head_schedule, similarity_aware, similarity_estimates
from longctx.parallel.attention.cost_model import explained, fitting
from longctx.parallel.attention.visibility import score_elements
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis

SIMILARITY_DIM = 64
"""Width of the keys of a similarity-aware router, where the model is as wide and the recipe says nothing."""


class MoeConfig(FeedForwardConfig):
    """`[model.moe]`: a mixture of SwiGLU experts, of which each token takes some, and none is dropped."""

    name: ClassVar[str] = "moe"

    experts: Integer = Field(gt=0)
    """Routed experts."""
    active: Integer = Field(gt=0)
    """Experts that each token takes."""
    hidden: Integer = Field(gt=0)
    """Hidden width of an expert."""
    shared: Integer = Field(default=0, ge=0)
    """Experts that all tokens take beside those: one layer of width `shared * hidden`."""
    shared_hidden: Integer | None = Field(default=None, gt=0)
    """Width of that layer, where it is another."""
    shared_gate: bool = False
    """Multiply what that layer gives with a number for each token, the sigmoid of a projection of its input, as in
    Qwen's models."""
    router: Literal["token", "similarity", "attention"] = "token"
    """By what a token chooses: its own scores, or an average of those of its document up to it: weighted by how like
    the tokens are (`similarity`, with matrices that are learned), or by the attention of the block's softmax layer
    (`attention`, the mean of its heads; every layer with experts then needs one)."""
    similarity_dim: Integer | None = Field(default=None, gt=0)
    """Width of the queries and keys by which tokens are compared, with the router `similarity`; where absent 64, or
    `dim` where that is less."""
    temperature: float | None = Field(default=None, gt=0)
    """Of that comparison: its weights are the softmax of `q k / (temperature * sqrt(similarity_dim))`; 1 where absent.
    The lower, the more only what is most alike counts."""
    score: Score = "softmax"
    """What makes scores of the router's logits."""
    normalize: bool = True
    """Divide a token's weights by their sum. With one active expert every weight is then 1, and the router learns from
    the losses of `balance` and `z` alone."""
    scale: float = Field(default=1.0, gt=0)
    """Factor of the routed experts' sum."""
    groups: Integer = Field(default=1, gt=0)
    """Groups of neighbouring experts, a divisor of `experts`."""
    active_groups: Integer = Field(default=1, gt=0)
    """Groups that a token chooses its experts from."""
    balance: float = Field(default=0.01, ge=0)
    """Coefficient of the loss that keeps the load even."""
    z: float = Field(default=0.0, ge=0)
    """Coefficient of the loss that keeps logits small; 1e-3 where it is used."""
    bias_rate: float = Field(default=0.0, ge=0)
    """Change, after each step, of a bias that is added to scores for the choice alone, and keeps the load even without
    a loss; 1e-3 where it is used."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training, the router's input is multiplied with numbers of chance between `1 - jitter` and `1 + jitter`."""
    capacity: float | None = Field(default=None, gt=0)
    """Choices that an expert takes of a sequence at most in training, as a multiple of the mean; what comes later in
    the sequence is dropped. Nothing is dropped where absent."""

    def problems(self) -> list[str]:
        found = []
        if self.active > self.experts:
            found.append(f"active: {self.active} of {self.experts} experts")
        if self.experts % self.groups:
            found.append(f"groups: {self.groups} groups do not divide {self.experts} experts")
        elif self.active_groups > self.groups:
            found.append(f"active_groups: {self.active_groups} of {self.groups} groups")
        elif self.active > self.experts // self.groups * self.active_groups:
            have = self.experts // self.groups * self.active_groups
            found.append(
                f"active_groups: {self.active_groups} groups have {have} experts, and a token takes {self.active}"
            )
        if not self.shared:
            given = {"shared_hidden": self.shared_hidden is not None, "shared_gate": self.shared_gate}
            found += [f"{key}: no expert is shared (shared = 0); remove it" for key, said in given.items() if said]
        if self.router != "similarity":
            found += [
                f"{key}: only the router 'similarity' has it, and this one is {self.router!r}; remove it"
                for key in ("similarity_dim", "temperature")
                if getattr(self, key) is not None
            ]
        return found

    @property
    def borrows(self) -> bool:
        return self.router == "attention"

    def available_schedules(self, size: int, ulysses: int) -> tuple[str, Sequence[str]] | None:
        return ("attention", fitting(1, size, ulysses)) if self.router == "similarity" else None

    @property
    def shared_width(self) -> int:
        """That of the layer of shared experts; 0 where there is none."""
        return self.shared and (self.shared_hidden or self.shared * self.hidden)

    def resolved(self, dim: int) -> "MoeConfig":
        return self.model_copy(update={"shared": min(self.shared, 1), "shared_hidden": self.shared_width or None})

    @property
    def rule(self) -> TokenChoice:
        """How tokens choose."""
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
    """How like tokens are: `u_i^T W_a^T W_b u_j / tau` (`longctx.moe.token_graph`), tau = temperature sqrt(K).

    W_a and W_b begin equal, so that a token is at first most like itself and its scores are near its own: with two
    matrices of chance every token would begin with an average over all, and all with the same experts.
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
        """The first value of a parameter: each of the two from N(0, 1 / dim), as projections are."""
        return (torch.randn(self.width, shape[1], generator=generator) * shape[1] ** -0.5).repeat(2, 1)

    def forward(self, u: Tensor, r: Tensor, layout: Layout, cache: Cache | None) -> Tensor:
        """Scores r `[B, T_local, E]` averaged over the tokens of `u [B, T_local, D]` that are like each, in r's dtype.

        With a memory over those that are remembered too.
        """
        q, k = F.linear(u, self.weight).chunk(2, dim=-1)
        if cache is None:
            return similarity_aware(r, q, k, layout, self.scale)
        q, k, values = (x.to(r.dtype)[:, :, None] for x in (q, k, r))
        out, _ = attend(q, k, values, layout, self.scale, None, cache.routed)
        return out[:, :, 0]

    def flops(self, layout: Layout, experts: int) -> int:
        """Projections, and for each pair of tokens that see each other a score and a weighted sum."""
        return 2 * layout.local_length * self.weight.numel() + 2 * (self.width + experts) * score_elements(layout)


class Experts(nn.Module):
    """The weights of the experts, or under expert parallelism of those that this rank has."""

    def __init__(self, count: int, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.count = count
        """Over all ranks."""
        self.gate_up = nn.Parameter(torch.empty(count, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(count, dim, hidden))
        self.stds = {"gate_up": dim**-0.5, "down": hidden**-0.5 * (2 * depth) ** -0.5}
        """Of each expert's matrices at initialisation, which are drawn one by one."""
        self.axis = Axis()
        """The ranks that divide the experts between them."""
        self.tile: int | None = None
        """Rows whose hidden activations exist at one time."""

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """`[N, D]` to the same, for rows sorted by this rank's experts, each of which ends before `ends`."""
        gate_up, down = (w.to_local() if isinstance(w, DTensor) else w for w in (self.gate_up, self.down))
        with torch.autocast(rows.device.type, enabled=False):
            return grouped_swiglu(rows, ends, gate_up.to(rows.dtype), down.to(rows.dtype), self.tile)

    @property
    def flops_of_one(self) -> int:
        """Forward multiplications and additions of one expert for one token."""
        return 2 * (self.gate_up.numel() + self.down.numel()) // self.count


class MixtureOfExperts(FeedForward):
    """`sum_e w_e(x) FFN_e(x)` over each token's experts, and `FFN_shared(x)`, perhaps times `sigmoid(x W)`."""

    bias: Tensor | None

    def __init__(self, config: MoeConfig, dim: int, layer: int, depth: int) -> None:
        super().__init__()
        self.rule, self.layer = config.rule, layer
        self.bias_rate, self.jitter = config.bias_rate, config.jitter
        self.router = Router(dim, config.experts)
        self.borrowed = config.experts if config.borrows else 0
        self.similarity: Similarity | None = None
        if config.router == "similarity":
            width = config.similarity_dim or min(SIMILARITY_DIM, dim)
            self.similarity = Similarity(dim, width, 1.0 if config.temperature is None else config.temperature)
        self.experts = Experts(config.experts, dim, config.hidden, depth)
        self.shared = Swiglu(dim, config.shared_width, depth) if config.shared else None
        self.shared_gate = Linear(dim, 1) if config.shared_gate else None
        self.register_buffer("bias", torch.zeros(config.experts) if config.bias_rate else None)

    def reset_buffers(self) -> None:
        """Fill what is not a parameter."""
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()

    @property
    def tile(self) -> int | None:
        """As in every feed-forward."""
        return self.experts.tile

    @tile.setter
    def tile(self, tile: int | None) -> None:
        self.experts.tile = tile
        if self.shared is not None:
            self.shared.tile = tile

    def forward(self, x: Tensor, layout: Layout, attend: Attend | None = None, cache: Cache | None = None) -> Output:
        """`[B, T_local, D]` to the same; 0 for padding where no expert is shared."""
        seen = x
        if self.training and self.jitter:
            seen = x * around_one(layout, self.jitter, x.shape, self.layer, x.device).to(x.dtype)
        logits = self.router(seen)
        p = scores(logits, self.rule.score)
        if self.similarity is not None:
            p = self.similarity(seen, p, layout, cache)
        elif self.borrowed:
            if attend is None:
                raise ValueError(f"experts of layer {self.layer}: their router reads the mixer's attention; give it")
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
        """Move the bias, where there is one: counts `[E]` are the choices of a step's tokens, over all ranks."""
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

    def describe_schedule(self, layout: Layout, dtype: torch.dtype) -> str | None:
        """The schedule of a similarity-aware router, where the layout leaves it to be chosen."""
        del dtype  # what is attended with is as wide as scores are
        if self.similarity is None or layout.size == 1 or one_head_schedule(layout) != "auto":
            return None
        return explained(similarity_estimates(layout, self.similarity.width, self.experts.count, torch.float32))

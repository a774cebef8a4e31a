"""Mixture of experts in the place of a feed-forward: a router in float32, SwiGLU experts, perhaps shared ones."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longctx.config import Integer
from longctx.kernels.ffn import grouped_swiglu
from longctx.model.ffn import FeedForward, FeedForwardConfig, Swiglu
from longctx.model.layers import Output
from longctx.model.router import Router
from longctx.moe.expert_router import Score, TokenChoice, balancing_step, choose_experts, scores
from longctx.moe.experts import mixture_of_experts
from longctx.moe.noise import around_one
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis


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
        return found

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
        }
        return self.model_copy(update=changes)

    def build(self, dim: int, layer: int, depth: int) -> "MixtureOfExperts":
        return MixtureOfExperts(self, dim, layer, depth)


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
    """`sum_e w_e(x) FFN_e(x)` over each token's experts, and `FFN_shared(x)`."""

    bias: Tensor | None

    def __init__(self, config: MoeConfig, dim: int, layer: int, depth: int) -> None:
        super().__init__()
        self.rule, self.layer = config.rule, layer
        self.bias_rate, self.jitter = config.bias_rate, config.jitter
        self.router = Router(dim, config.experts)
        self.experts = Experts(config.experts, dim, config.hidden, depth)
        self.shared = Swiglu(dim, config.shared * config.hidden, depth) if config.shared else None
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

    def forward(self, x: Tensor, layout: Layout) -> Output:
        """`[B, T_local, D]` to the same; 0 for padding where no expert is shared."""
        seen = x
        if self.training and self.jitter:
            seen = x * around_one(layout, self.jitter, x.shape, self.layer, x.device).to(x.dtype)
        logits = self.router(seen)
        p = scores(logits, self.rule.score)
        rule = self.rule if self.training else replace(self.rule, capacity=None)
        routing = choose_experts(logits, p, rule, layout, bias=self.bias)
        out = mixture_of_experts(x, routing, self.experts.count, self.experts, self.experts.axis)
        if self.shared is not None:
            out = out + self.shared(x, layout)
        return Output(out, routing.report)

    @torch.no_grad()
    def after_step(self, counts: Tensor) -> None:
        """Move the bias, where there is one: counts `[E]` are the choices of a step's tokens, over all ranks."""
        if self.bias is not None:
            self.bias.copy_(balancing_step(self.bias, counts, self.bias_rate))

    @property
    def flops_per_token(self) -> int:
        shared = 0 if self.shared is None else self.shared.flops_per_token
        return self.router.flops_per_token + self.rule.active * self.experts.flops_of_one + shared

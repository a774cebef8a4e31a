"""DeltaNet, Gated DeltaNet and Kimi Delta Attention (KDA): the delta rule and its gated forms.

q, k, v = SiLU(conv(x W_q)), SiLU(conv(x W_k)), SiLU(conv(x W_v)), q and k L2-normalised, q divided by sqrt(K)
b = sigmoid(x W_b), one per head (twice that with `negative_eigenvalues`)
S_t = (I - b_t k_t k_t^T) diag(a_t) S_{t-1} + b_t k_t v_t^T      o_t = S_t^T q_t

DeltaNet (Yang et al. 2024): a = 1                                              y = RMSNorm per head of o, W_o
Gated DeltaNet (Yang et al. 2025): log a = -exp(A) softplus(x W_a + c), per head      ... * SiLU(x W_g), W_o
    Several value heads may share one query/key head, as in Qwen3-Next.
KDA (Kimi Linear, 2025): log a = -exp(A) softplus(x W_1 W_2 + c), per channel   ... * sigmoid(x W_3 W_4), W_o
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from longctx.config import Integer
from longctx.kernels.linear.delta import DELTA
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache, begin_cached_scan
from longctx.layers.linear_attention import HeadNorm, LowRank, StepDecay, l2_norm
from longctx.layers.output import Output
from longctx.mixers.head_mixture import project_output
from longctx.mixers.linear_mixer import HeadsConfig, LinearMixer
from longctx.mixers.shares import Share, row_shares
from longctx.parallel.layout import Layout


class _DeltaConfig(HeadsConfig):
    """Configuration keys that the three mixers share."""

    conv: Integer = Field(default=4, ge=0, le=8)
    """Kernel size of the short convolution on q, k and v, followed by SiLU; 0 for none."""
    negative_eigenvalues: bool = False
    """Scale beta to (0, 2) instead of (0, 1): transitions can then have negative eigenvalues (Grazzi et al. 2024)."""


class DeltaNetConfig(_DeltaConfig):
    """`[model.deltanet]`: the delta rule without decay (letter D)."""

    name: ClassVar[str] = "deltanet"
    letter: ClassVar[str] = "D"

    def shrunk(self) -> "DeltaNetConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "DeltaNet":
        return DeltaNet(self, dim, depth, eps)


class GatedDeltaNetConfig(_DeltaConfig):
    """`[model.gated_deltanet]`: the delta rule with a decay per head (letter E)."""

    name: ClassVar[str] = "gated_deltanet"
    letter: ClassVar[str] = "E"

    value_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head. Default: `2 * head_dim`."""
    qk_heads: Integer | None = Field(default=None, gt=0)
    """Number of query/key heads (grouped values), a divisor of `heads`. Default: `heads`."""

    def problems(self, dim: int) -> list[str]:
        problems = super().problems(dim)
        if self.qk_heads is not None and self.heads % self.qk_heads:
            problems.append(f"qk_heads: {self.heads} heads are not a multiple of {self.qk_heads} query/key heads")
        return problems

    def routable(self) -> tuple[int, int] | None:
        # The queries of inactive heads are set to zero, so heads that share queries cannot be routed separately.
        return super().routable() if self.qk_heads in (None, self.heads) else None

    def resolved(self, dim: int) -> "GatedDeltaNetConfig":
        head_dim = self.key_dim(dim)
        changes = {"value_dim": self.value_dim or 2 * head_dim, "qk_heads": self.qk_heads or self.heads}
        return self.model_copy(update={"head_dim": head_dim, **changes})

    def shrunk(self) -> "GatedDeltaNetConfig":
        heads, few = min(self.heads, 4), None
        if self.qk_heads is not None:
            few = min(self.qk_heads, 2)
            heads = few * min(self.heads // self.qk_heads, 2)
        return self.model_copy(update={"heads": heads, "qk_heads": few, "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "GatedDeltaNet":
        return GatedDeltaNet(self, dim, depth, eps)


class KdaConfig(_DeltaConfig):
    """`[model.kda]`: Kimi Delta Attention, the delta rule with a decay per channel (letter K)."""

    name: ClassVar[str] = "kda"
    letter: ClassVar[str] = "K"

    value_dim: Integer | None = Field(default=None, gt=0)
    """Value width per head. Default: `head_dim`."""

    def shrunk(self) -> "KdaConfig":
        return self.model_copy(update={"heads": min(self.heads, 4), "head_dim": 8, "value_dim": 12})

    def build(self, dim: int, layer: int, depth: int, eps: float) -> "Kda":
        return Kda(self, dim, depth, eps)


class _Delta(LinearMixer):
    """Base class of the three layers."""

    writes = 2
    norm: HeadNorm

    def __init__(self, config: _DeltaConfig, dim: int, depth: int, value_dim: int, qk_heads: int | None = None) -> None:
        self.head_dim, self.max_beta = config.key_dim(dim), 2.0 if config.negative_eigenvalues else 1.0
        width = (qk_heads or config.heads) * self.head_dim
        widths = (width, width, config.heads * value_dim)
        super().__init__(dim, depth, config.heads, widths, config.conv, qk_heads=qk_heads)
        self.beta = Linear(dim, config.heads)

    def shares(self) -> dict[str, Share]:
        """Return the shares of the base class and of beta, the decay and the output gate, as far as there are any."""
        decay = ("step.weight", "step.up.weight", "decay.A_log", "decay.dt_bias")
        return super().shares() | row_shares(self, "beta.weight", *decay, "gate.weight", "gate.up.weight", "gate.bias")

    def delta_rule(
        self, x: Tensor, layout: Layout, cache: Cache | None, *log_decay: Tensor, gate: nn.Module | None = None
    ) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`, optionally with log decays and an output gate."""
        routing = self.route(x, layout)
        q, k, v = self.project(x, layout, cache, routing)
        if self.conv is None:
            q, k, v = (nn.functional.silu(y) for y in (q, k, v))
        k, gates = l2_norm(k), (self.max_beta * self.beta(x).sigmoid(), *log_decay)
        scan = begin_cached_scan(DELTA, k, v, gates, layout, cache)
        q = l2_norm(q) * self.head_dim**-0.5  # overlaps with the state exchange
        output_gate = None if gate is None else self.project_gate(gate, x, routing)
        out = scan.finish(q)
        return project_output(self.norm(out, output_gate), self.out, routing)


class DeltaNet(_Delta):
    """DeltaNet layer; equations in the module's docstring."""

    def __init__(self, config: DeltaNetConfig, dim: int, depth: int, eps: float) -> None:
        super().__init__(config, dim, depth, config.key_dim(dim))
        self.norm = HeadNorm(self.head_dim, eps)

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`; the shape stays."""
        return self.delta_rule(x, layout, cache)


class GatedDeltaNet(_Delta):
    """Gated DeltaNet layer; equations in the module's docstring."""

    def __init__(self, config: GatedDeltaNetConfig, dim: int, depth: int, eps: float) -> None:
        value_dim = config.value_dim or 2 * config.key_dim(dim)
        super().__init__(config, dim, depth, value_dim, config.qk_heads)
        self.step, self.decay = Linear(dim, config.heads), StepDecay(config.heads, config.heads)
        self.gate = Linear(dim, config.heads * value_dim)
        self.norm = HeadNorm(value_dim, eps, "silu")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`; the shape stays."""
        log_decay, _ = self.decay(self.step(x))
        return self.delta_rule(x, layout, cache, log_decay, gate=self.gate)


class Kda(_Delta):
    """KDA layer; equations in the module's docstring. Low-rank matrices have rank `value_dim`."""

    def __init__(self, config: KdaConfig, dim: int, depth: int, eps: float) -> None:
        value_dim = config.value_dim or config.key_dim(dim)
        super().__init__(config, dim, depth, value_dim)
        width = config.heads * self.head_dim
        self.step, self.decay = LowRank(dim, value_dim, width), StepDecay(config.heads, width)
        self.gate = LowRank(dim, value_dim, config.heads * value_dim, bias=True)
        self.norm = HeadNorm(value_dim, eps, "sigmoid")

    def mix(self, x: Tensor, layout: Layout, cache: Cache | None) -> Tensor | Output:
        """Compute the layer for x `[B, T_local, D]`; the shape stays."""
        log_decay, _ = self.decay(self.step(x).unflatten(-1, (self.heads, self.head_dim)))
        return self.delta_rule(x, layout, cache, log_decay, gate=self.gate)

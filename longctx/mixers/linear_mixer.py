"""Base of linear mixers: a fused q, k, v projection, an optional short convolution, and the output projection."""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache
from longctx.layers.linear_attention import ShortConvolution
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.head_mixture import project_active, zero_inactive
from longctx.mixers.shares import Share
from longctx.moe.head_router import HeadRouting
from longctx.parallel.layout import Layout


class HeadsConfig(MixerConfig):
    """Configuration keys of mixers with heads of equal width."""

    heads: Integer = Field(gt=0)
    """Number of heads, each with its own recurrent state."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Key width per head. Default: `dim / heads`."""

    def problems(self, dim: int) -> list[str]:
        return head_dim_problems(dim, self.heads, self.head_dim)

    def routable(self) -> tuple[int, int] | None:
        return self.heads, 1

    def key_dim(self, dim: int) -> int:
        """Return the key width per head, K, for a model of width `dim`."""
        return self.head_dim or dim // self.heads


class LinearMixer(Mixer):
    """Base class of linear mixers whose q, k and v come from one projection, optionally through a short convolution.

    `widths` are the channels of q, k and v, of all heads together. A subclass computes its gates and runs its
    recurrence. Submodules with `flops_per_token` are counted in `flops`.
    """

    head_counts = ("heads", "qk_heads", "widths")
    writes = 1
    """Passes over the recurrent state to update it: 2 with the delta rule."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        widths: tuple[int, int, int],
        conv: int,
        activation: str | None = "silu",
        qk_heads: int | None = None,
    ) -> None:
        """`conv` is the kernel size of the convolution, 0 for none; `activation` follows it. `qk_heads` is the number
        of heads of q and k, a divisor of `heads` (grouped values), `heads` if None."""
        super().__init__()
        self.heads, self.qk_heads, self.widths = heads, qk_heads or heads, widths
        self.qkv = Linear(dim, sum(widths))
        self.conv = ShortConvolution(sum(widths), conv, activation=activation) if conv else None
        self.out = Linear(widths[2], dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Return the shares of the q, k, v projection, the convolution and the output; subclasses add their gates."""
        shares = {"qkv.weight": Share(0, self.widths), "out.weight": Share(1, self.widths[2:])}
        return shares if self.conv is None else shares | {"conv.weight": Share(0, self.widths)}

    def project(
        self, x: Tensor, layout: Layout, cache: Cache | None, routing: HeadRouting | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q and k `[B, T_local, H_qk, K]` and v `[B, T_local, H, V]`, after the convolution if there is one.

        Queries of inactive heads are zero.
        """
        if self.conv is None and routing is not None:
            w_q, w_kv = self.qkv.weight.split([self.widths[0], self.widths[1] + self.widths[2]])
            k, v = F.linear(x, w_kv).split(self.widths[1:], dim=-1)
            q = project_active(x, w_q, self.heads, routing)
            return q, k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv = self.conv(qkv, layout, cache)
        heads = (self.qk_heads, self.qk_heads, self.heads)
        q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(qkv.split(self.widths, dim=-1), heads, strict=True))
        return zero_inactive(q, routing), k, v

    def project_gate(self, gate: nn.Module, x: Tensor, routing: HeadRouting | None) -> Tensor:
        """Project x to its output gate, `[B, T_local, H, V]`; if the gate is one matrix, for active heads only."""
        if isinstance(gate, Linear):
            return project_active(x, gate.weight, self.heads, routing)
        return gate(x).unflatten(-1, (self.heads, -1))

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of projections and convolutions and, per head, of state updates and reads."""
        per_token = sum(getattr(module, "flops_per_token", 0) for module in self.children())
        key_dim, value_dim = self.widths[1] // self.qk_heads, self.widths[2] // self.heads
        per_token += 2 * (self.writes + 1) * self.heads * key_dim * value_dim
        # An inactive head saves its read of the state and its rows of the query, gate and output projections.
        dim, gate = self.out.out_features, getattr(self, "gate", None)
        rows = value_dim + (key_dim if self.conv is None else 0) + (value_dim if isinstance(gate, Linear) else 0)
        return layout.local_length * (per_token - self.inactive_heads * (2 * key_dim * value_dim + 2 * dim * rows))

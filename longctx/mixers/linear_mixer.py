"""Base of the linear mixers: one projection to q, k and v, a short convolution where there is one, an output matrix."""

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longctx.config import Integer
from longctx.layers.basic import Linear
from longctx.layers.cache import Cache
from longctx.layers.linear_attention import ShortConvolution
from longctx.mixers.base import Mixer, MixerConfig, head_dim_problems
from longctx.mixers.head_mixture import hidden, read
from longctx.mixers.shares import Share
from longctx.moe.head_router import HeadRouting
from longctx.parallel.layout import Layout


class HeadsConfig(MixerConfig):
    """The keys of a mixer with heads of equal width."""

    heads: Integer = Field(gt=0)
    """Heads, each with a state of its own."""
    head_dim: Integer | None = Field(default=None, gt=0)
    """Width of keys per head; `dim / heads` where absent."""

    def problems(self, dim: int) -> list[str]:
        return head_dim_problems(dim, self.heads, self.head_dim)

    def routable(self) -> tuple[int, int] | None:
        return self.heads, 1

    def key_dim(self, dim: int) -> int:
        """K for a model of width `dim`."""
        return self.head_dim or dim // self.heads


class LinearMixer(Mixer):
    """A mixer whose q, k and v come from one projection, perhaps through a short convolution.

    `q_width`, `k_width`, `v_width` are channels of all heads together. A subclass says what its gates are and which
    recurrence reads them; whatever of it has `flops_per_token` is counted.
    """

    counts = ("heads", "qk_heads", "widths")
    writes = 1
    """Times that a token's state is gone over to write: 2 with the delta rule."""

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
        """`conv`: tokens of the convolution, 0 for none; `activation`: what follows it; `qk_heads`: those of q and k,
        a divisor of `heads`, each of which as many neighbours read; `heads` where None."""
        super().__init__()
        self.heads, self.qk_heads, self.widths = heads, qk_heads or heads, widths
        self.qkv = Linear(dim, sum(widths))
        self.conv = ShortConvolution(sum(widths), conv, activation=activation) if conv else None
        self.out = Linear(widths[2], dim, scale=(2 * depth) ** -0.5)

    def shares(self) -> dict[str, Share]:
        """Queries, keys and values, their convolution, and the output's columns; a subclass adds its gates'."""
        found = {"qkv.weight": Share(0, self.widths), "out.weight": Share(1, self.widths[2:])}
        return found if self.conv is None else found | {"conv.weight": Share(0, self.widths)}

    def project(
        self, x: Tensor, layout: Layout, cache: Cache | None, routing: HeadRouting | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v by heads, `[B, T_local, H_qk, K]` and `[B, T_local, H, V]`, after the convolution if there is one.

        Queries of heads that a token does not read are zero.
        """
        if self.conv is None and routing is not None:
            for_q, for_kv = self.qkv.weight.split([self.widths[0], self.widths[1] + self.widths[2]])
            k, v = F.linear(x, for_kv).split(self.widths[1:], dim=-1)
            q = read(x, for_q, self.heads, routing)
            return q, k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv = self.conv(qkv, layout, cache)
        heads = (self.qk_heads, self.qk_heads, self.heads)
        q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(qkv.split(self.widths, dim=-1), heads, strict=True))
        return hidden(q, routing), k, v

    def opened(self, gate: nn.Module, x: Tensor, routing: HeadRouting | None) -> Tensor:
        """The output gate of x, `[B, T_local, H, V]`: of the heads that are read, where it is one matrix."""
        if isinstance(gate, Linear):
            return read(x, gate.weight, self.heads, routing)
        return gate(x).unflatten(-1, (self.heads, -1))

    def flops(self, layout: Layout) -> int:
        """Projections and convolutions, and per token and head the writes and a read of the state."""
        per_token = sum(getattr(module, "flops_per_token", 0) for module in self.children())
        key_dim, value_dim = self.widths[1] // self.qk_heads, self.widths[2] // self.heads
        per_token += 2 * (self.writes + 1) * self.heads * key_dim * value_dim
        # Of a head that is not read: its read, its rows of the output projection, of the queries' and the gate's.
        dim, gate = self.out.out_features, getattr(self, "gate", None)
        rows = value_dim + (key_dim if self.conv is None else 0) + (value_dim if isinstance(gate, Linear) else 0)
        return layout.local_length * (per_token - self.unread * (2 * key_dim * value_dim + 2 * dim * rows))

"""Parts that the equations of several layers have: activations, norms, convolution, rotary embedding, recurrence.

Every equation is a function of a layer's parameters (`parameters_of`), its input and its configuration.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longctx.kernels.linear.reference import linear_recurrence

Parameters = SimpleNamespace
"""A layer's parameters by name, in namespaces as its modules are nested: `p.conv.weight`."""
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerContext:
    """What a layer's equations need beside its parameters, its configuration and its input."""

    bounds: tuple[int, ...]
    """Document boundaries, from 0 to T."""
    layer: int
    """Number of the layer, from 0."""
    depth: int
    """Number of layers of the model."""
    eps: float
    """Epsilon of the norms."""
    sequence: int = 0
    """Index of the sequence, a key of the random numbers."""

    @property
    def documents(self) -> list[tuple[int, int]]:
        """First token of each document, and the one after its last."""
        return list(itertools.pairwise(self.bounds))


class HeadFactors(NamedTuple):
    """Routing of a mixture of heads."""

    active: Tensor
    """`[B, T, H]`: 1 where a token uses a head, else 0."""
    weights: Tensor
    """`[B, T, H]`: the factor of each head's output, 0 for inactive ones."""
    loss: Tensor
    """The load-balancing loss, times its coefficient."""


def parameters_of(module: nn.Module) -> Parameters:
    """Return a module's parameters and persistent buffers: all of it that the equations read.

    They are the tensors themselves, so gradients with respect to them are those of the module's parameters. Buffers
    that derive from the configuration (decays) are not persistent, and so not among them.
    """
    root = Parameters()
    for name, tensor in module.state_dict(keep_vars=True).items():
        *path, last = name.split(".")
        here = root
        for part in path:
            here = here.__dict__.setdefault(part, Parameters())
        setattr(here, last, tensor)
    return root


def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


def sigmoid(x: Tensor) -> Tensor:
    """Compute `1 / (1 + exp(-x))`."""
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Compute `x sigmoid(x)`."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """Compute `log(1 + exp(x))`."""
    return torch.log1p(torch.exp(x))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """View `[..., H K]` as `[..., H, K]`."""
    return x.unflatten(-1, (heads, -1))


def normed(x: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps)` over the last dimension."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def weighted_norm(x: Tensor, weight: Tensor, kind: str, eps: float) -> Tensor:
    """Compute a norm with a weight, of the kind `rms` or `zero_centered_rms`, over the last dimension."""
    return normed(x, eps) * {"rms": weight, "zero_centered_rms": 1 + weight}[kind]


def expect_size(what: str, size: int, expected: int) -> None:
    """Raise ValueError if a parameter has another size than its configuration says."""
    if size != expected:
        raise ValueError(f"equations: {what} is {size} in the model, and {expected} by its configuration")


def low_rank(p: Parameters, x: Tensor, rank: int, *, bias: bool = False) -> Tensor:
    """Compute `x W_1 W_2`, plus a bias where there is one. Raises ValueError for another rank."""
    expect_size("the rank of a projection", p.down.weight.shape[0], rank)
    y = x @ p.down.weight.T @ p.up.weight.T
    return y + p.bias if bias else y


def convolved(
    x: Tensor, p: Parameters, context: LayerContext, taps: int, activation: Activation = silu, *, bias: bool = False
) -> Tensor:
    """Compute `activation(b + sum_i w_i x_{t - J + 1 + i})` for x `[B, T, D]`, over the J taps in t's document.

    Raises ValueError for another kernel size J than `taps`.
    """
    expect_size("the kernel size of a convolution", p.weight.shape[1], taps)
    parts = []
    for begin, end in context.documents:
        line = torch.cat([x.new_zeros(x.shape[0], taps - 1, x.shape[2]), x[:, begin:end]], dim=1)
        terms = [p.weight[:, i] * line[:, i : i + end - begin] for i in range(taps)]
        parts.append(torch.stack(terms).sum(dim=0))
    y = torch.cat(parts, dim=1)
    return activation(y + p.bias if bias else y)


def projected(
    p: Parameters,
    x: Tensor,
    context: LayerContext,
    heads: tuple[int, int],
    widths: tuple[int, int],
    *,
    conv: int = 0,
    activation: Activation = silu,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute q, k `[B, T, H_qk, K]` and v `[B, T, H, V]`, rows of one projection in this order.

    `heads` are H_qk and H, `widths` K and V; a convolution of kernel size `conv`, if not 0, and `activation` follow.
    """
    y = x @ p.qkv.weight.T
    if conv:
        y = convolved(y, p.conv, context, conv, activation)
    (qk_heads, v_heads), (key_dim, value_dim) = heads, widths
    q, k, v = y.split([qk_heads * key_dim, qk_heads * key_dim, v_heads * value_dim], dim=-1)
    return split_heads(q, qk_heads), split_heads(k, qk_heads), split_heads(v, v_heads)


def rotary_frequencies(theta: float, channels: int) -> list[float]:
    """Compute `theta^(-2i / channels)`, radians per token, for each pair of so many channels."""
    return [theta ** (-2 * i / channels) for i in range(channels // 2)]


def rotated(x: Tensor, context: LayerContext, frequencies: list[float]) -> Tensor:
    """Apply RoPE to the first channels of x `[B, T, H, K]`, two for each of the `frequencies`.

    Of n channels, i and i + n / 2 are a complex number, which is turned by the token's position in its document times
    the frequency.
    """
    half = len(frequencies)
    positions = torch.cat([torch.arange(end - begin, dtype=torch.float64) for begin, end in context.documents])
    angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    number = torch.complex(x[..., :half], x[..., half : 2 * half])
    number = number * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.cat([number.real, number.imag, x[..., 2 * half :]], dim=-1)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: LayerContext,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """Run the recurrence of a linear mixer token by token; shapes as in `longctx.kernels.linear.reference`."""
    return linear_recurrence(q, k, v, log_decay, beta, starts=context.bounds[:-1])[0]


def without_inactive(o: Tensor, factors: HeadFactors | None) -> Tensor:
    """Set the inactive heads of o `[B, T, H, V]` to 0, as norms over all heads have to see them."""
    return o if factors is None else o * factors.active[..., None]


def output(p: Parameters, heads: Tensor, factors: HeadFactors | None) -> Tensor:
    """Project the heads' outputs `[B, T, H, V]`, times the routing weights of a mixture of heads, to `[B, T, D]`."""
    heads = heads if factors is None else heads * factors.weights[..., None]
    return heads.flatten(2) @ p.out.weight.T


def visible(context: LayerContext, window: int | None = None) -> Tensor:
    """Mark the pairs `[T, T]` of a query and a key that it sees: of its document, not later, within the window."""
    numbers = torch.repeat_interleave(
        torch.arange(len(context.documents)), torch.tensor([end - begin for begin, end in context.documents])
    )
    distance = torch.arange(len(numbers))[:, None] - torch.arange(len(numbers))
    seen = (numbers[:, None] == numbers) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Compute `softmax(scale q k^T)` over the keys that the mask `[T, T]` shows: `[B, H, T, T]`.

    Shapes: q `[B, T, H, K]`, k `[B, T, H_kv, K]`; query head h reads key head `h // (H / H_kv)`.
    """
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1)

"""Reference implementations of short convolution, cross-entropy, RMSNorm and SwiGLU, written from the equations.

Dtype-preserving and differentiable by autograd, so that a float64 `gradcheck` is meaningful. Only tests call them, to
check the fast paths.
"""

import torch
from torch import Tensor


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    starts: tuple[int, ...] = (),
    before: Tensor | None = None,
) -> Tensor:
    """Compute `y_t = activation(bias + sum_{i < J} weight[:, i] x_{t - (J - 1) + i})`, token by token, `[B, T, D]`.

    Taps reach back to the start of the token's document; the first document continues from `before`. Shapes: x
    `[B, T, D]`, weight `[D, J]` (causal_conv1d's order), bias `[D]`, before `[B, J - 1, D]`, zeros by default;
    activation None or "silu".
    """
    taps, out = weight.shape[1], []
    line = x if before is None else torch.cat([before, x], dim=1)
    first = x.shape[1] - line.shape[1]
    for t in range(x.shape[1]):
        begin = max((start for start in starts if start <= t), default=first)
        y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
        for seen in range(max(begin, t - taps + 1), t + 1):
            y = y + weight[:, taps - 1 - (t - seen)] * line[:, seen - first]
        out.append(y / (1 + torch.exp(-y)) if activation == "silu" else y)
    return torch.stack(out, dim=1) if out else torch.zeros_like(x)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the negative log likelihood of each token in nats, `[T]`, 0 where the label is -100.

    Shapes: x `[T, D]`, weight `[N, D]`, labels `[T]` int64.
    """
    logp = torch.log_softmax(x @ weight.T, dim=-1)
    picked = logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, -picked, torch.zeros_like(picked))


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * scale` over the last dim."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * scale


def gated_rms_norm(x: Tensor, scale: Tensor, gate: Tensor, eps: float, activation: str) -> Tensor:
    """Compute `rms_norm(x) * silu(gate)`, or with the sigmoid of the gate."""
    sigmoid = 1 / (1 + torch.exp(-gate))
    return rms_norm(x, scale, eps) * (gate * sigmoid if activation == "silu" else sigmoid)


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute `gate * sigmoid(gate) * up`; gate and up are the halves of the last dim."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up

"""Equations of linear mixers, token by token, in plain torch: the parts that several have, and the comparison."""

import itertools
from collections.abc import Callable

import pytest
import torch

from longctx.kernels.linear.reference import linear_recurrence
from longctx.mixers import Mixer, MixerConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from tests.mixers.cases import DIM, OPTIONS, config_of

BOUNDS = (0, 1, 30, 69, 80)
STARTS = BOUNDS[:-1]
EPS = 1e-3

Equations = Callable[[Mixer, torch.Tensor, MixerConfig], torch.Tensor]


def silu(x):
    return x / (1 + torch.exp(-x))


def heads(x, n):
    return x.unflatten(-1, (n, -1))


def normed(x, eps=EPS):
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def convolved(x, conv, activation=silu):
    """Token by token and tap by tap; documents do not see each other."""
    width = conv.weight.shape[1]
    rows = []
    for begin, end in itertools.pairwise(BOUNDS):
        for t in range(begin, end):
            taps = [conv.weight[:, i] * x[:, t - width + 1 + i] for i in range(width) if t - width + 1 + i >= begin]
            rows.append(sum(taps) + (0 if conv.bias is None else conv.bias))
    return activation(torch.stack(rows, dim=1))


def projected(m, x, n, activation=silu):
    """q, k, v of a layer whose one projection makes them, in this order."""
    y = x @ m.qkv.weight.T
    y = y if m.conv is None else convolved(y, m.conv, activation)
    q, k, v = y.split(m.widths, dim=-1)
    q, k = (heads(part, m.qk_heads).repeat_interleave(n // m.qk_heads, dim=2) for part in (q, k))
    return [q, k, heads(v, n)]


def low_rank(m, x):
    y = x @ m.down.weight.T @ m.up.weight.T
    return y if m.bias is None else y + m.bias


def turned(x, theta):
    """RoPE by complex numbers; positions count from the start of each document."""
    half = x.shape[-1] // 2
    positions = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(BOUNDS)])
    angles = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.cat([number.real, number.imag], dim=-1)


def recurrence(q, k, v, log_decay=None, beta=None):
    return linear_recurrence(q, k, v, log_decay, beta, starts=STARTS)[0]


def draw():
    return torch.randn(2, BOUNDS[-1], DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def each_of(*letters: str) -> pytest.MarkDecorator:
    """Parametrize with mixers and the options that they have in `tests.mixers.cases`."""
    return pytest.mark.parametrize("letter", [*letters, *(option for option in OPTIONS if option[0] in letters)])


def check(letter: str, equations: Equations) -> None:
    """Outputs and gradients of the layer equal those of its equations."""
    config = config_of(letter)
    mixer, x = config.build(DIM, 1, 4, EPS).double(), draw()
    initialise(mixer, seed=5)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (lambda: mixer(x, Layout(BOUNDS)), lambda: equations(mixer, x, config)):
        mixer.zero_grad()
        y = function()
        y.backward(dy)
        results.append([y.detach(), *(p.grad for p in mixer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)

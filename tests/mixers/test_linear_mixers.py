"""Every linear layer against its equations, with the token-by-token recurrence and plain torch."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from longctx.kernels.linear.reference import linear_recurrence
from longctx.layers.linear_attention import StepDecay
from longctx.mixers import MIXERS
from longctx.mixers.hgrn2 import Hgrn2Config
from longctx.mixers.linear import LinearConfig
from longctx.mixers.mamba2 import Mamba2Config
from longctx.mixers.retention import RetentionConfig, log_decays
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from tests.mixers.cases import CONFIGS, DIM, OPTIONS, config_of

BOUNDS = (0, 1, 30, 69, 80)
STARTS = BOUNDS[:-1]
EPS = 1e-3


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


def basic_linear(m, x, c):
    q, k, v = heads(x @ m.qkv.weight.T, c.heads + 2 * c.kv_heads).split([c.heads, c.kv_heads, c.kv_heads], dim=2)

    def phi(y, f):
        y = torch.einsum("bthk,hkj->bthj", y, f.weight) + f.bias
        e = torch.cat([y.exp(), (-y).exp()], dim=-1)
        return e / e.sum(dim=-1, keepdim=True)

    q, k = phi(q, m.feature_q), phi(k, m.feature_k)
    o, weights = recurrence(q, k, v), recurrence(q, k, torch.ones_like(v))
    return (o / (weights + 1e-6)).flatten(2) @ m.out.weight.T


def retention(m, x, c):
    q, k, v = projected(m, x, c.heads)
    decays = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(c.heads)], dtype=torch.float64).log()
    o = recurrence(turned(q, 1e4), turned(k, 1e4) / c.head_dim**0.5, v, decays)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


def simple_gla(m, x, c):
    q, k, v = projected(m, x, c.heads)
    log_decay = torch.log(1 / (1 + torch.exp(-x @ m.decay.weight.T))) / 16
    o = recurrence(q / c.head_dim**0.5, k, v, log_decay)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


def gla(m, x, c):
    q, k, v = projected(m, x, c.heads)
    log_decay = heads(torch.log(1 / (1 + torch.exp(-low_rank(m.decay, x)))) / 16, c.heads)
    o = recurrence(q / c.head_dim**0.5, k, v, log_decay)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


def mamba2(m, x, c):
    width, keys = c.heads * c.head_dim, c.groups * c.state_dim
    z, u, dt = (x @ m.inner.weight.T).split([width, width + 2 * keys, c.heads], dim=-1)
    v, k, q = convolved(u, m.conv).split([width, keys, keys], dim=-1)
    v, k, q = heads(v, c.heads), heads(k, c.groups), heads(q, c.groups)
    dt = torch.log1p(torch.exp(dt + m.decay.dt_bias)).clamp(c.dt_min, c.dt_max)
    o = recurrence(q, k, v * dt[..., None], -m.decay.A_log.exp() * dt) + m.skip.weight[:, None] * v
    gated = normed((o.flatten(2) * silu(z)).unflatten(-1, (c.groups, -1))).flatten(2)
    return (gated * m.norm.weight) @ m.out.weight.T


def hgrn2(m, x, c):
    q, f, v = projected(m, x, c.heads, lambda y: y)
    low = heads(torch.sigmoid(m.bound.bound), c.heads)
    forget = low + (1 - low) * torch.sigmoid(f)
    o = recurrence(silu(q), 1 - forget, v, forget.log())
    return (normed(o.flatten(2)) * m.norm.weight) @ m.out.weight.T


def lightnet(m, x, c):
    q, k, v = projected(m, x, c.heads, lambda y: y)
    outs = []
    for begin, end in itertools.pairwise(BOUNDS):
        for t in range(begin, end):
            # The scan undone: each key's share of all keys so far in its document.
            share = k[:, begin : t + 1].softmax(dim=1)
            outs.append(torch.einsum("bhk,bshk,bshv->bhv", silu(q[:, t]), share, v[:, begin : t + 1]))
    o = torch.stack(outs, dim=1) / c.head_dim**0.5
    return (normed(o.flatten(2)) * m.norm.weight * silu(low_rank(m.gate, x))) @ m.out.weight.T


def delta_operands(m, x, c):
    q, k, v = projected(m, x, c.heads)
    if m.conv is None:
        q, k, v = silu(q), silu(k), silu(v)
    length = lambda y: (y.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    beta = torch.sigmoid(x @ m.beta.weight.T) * (2 if c.negative_eigenvalues else 1)
    return q / length(q) / c.head_dim**0.5, k / length(k), v, beta


def deltanet(m, x, c):
    q, k, v, beta = delta_operands(m, x, c)
    return (normed(recurrence(q, k, v, None, beta)) * m.norm.weight).flatten(2) @ m.out.weight.T


def gated_deltanet(m, x, c):
    q, k, v, beta = delta_operands(m, x, c)
    log_decay = -m.decay.A_log.exp() * torch.log1p(torch.exp(x @ m.step.weight.T + m.decay.dt_bias))
    o = recurrence(q, k, v, log_decay, beta)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


def kda(m, x, c):
    q, k, v, beta = delta_operands(m, x, c)
    dt = torch.log1p(torch.exp(heads(low_rank(m.step, x) + m.decay.dt_bias, c.heads)))
    o = recurrence(q, k, v, -m.decay.A_log.exp()[:, None] * dt, beta)
    gate = heads(torch.sigmoid(low_rank(m.gate, x)), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


EQUATIONS = {
    "B": basic_linear,
    "R": retention,
    "I": simple_gla,
    "M": mamba2,
    "G": gla,
    "H": hgrn2,
    "N": lightnet,
    "D": deltanet,
    "E": gated_deltanet,
    "K": kda,
}


def draw():
    return torch.randn(2, BOUNDS[-1], DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("letter", [*EQUATIONS, *(option for option in OPTIONS if option[0] in EQUATIONS)])
def test_layer_equals_its_equations_and_so_do_its_gradients(letter):
    config, equations = config_of(letter), EQUATIONS[letter[0]]
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


def test_every_linear_layer_is_compared_with_its_equations():
    assert set(EQUATIONS) | {"L", "S", "A"} == set(MIXERS), "these have files of their own"


@pytest.mark.parametrize("name", ["identity", "relu", "silu", "elu1"])
def test_feature_maps_without_a_denominator(name):
    mixer, x = (
        LinearConfig(heads=2, head_dim=5, feature_map=name, normalize=False).build(DIM, 0, 1, EPS).double(),
        draw(),
    )
    initialise(mixer, seed=5)
    maps = {"identity": lambda y: y, "relu": F.relu, "silu": silu, "elu1": lambda y: torch.where(y > 0, y + 1, y.exp())}
    q, k, v = heads(x @ mixer.qkv.weight.T, 6).split(2, dim=2)
    o = recurrence(maps[name](q), maps[name](k), v)
    want = normed(o).flatten(2) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x, Layout(BOUNDS)), want, rtol=1e-9, atol=1e-10)


def test_the_first_layer_of_hgrn2_has_no_lower_bound_and_the_others_begin_at_their_share_of_the_depth():
    first, third = (Hgrn2Config(heads=2).build(8, layer, 4, EPS) for layer in (0, 2))
    assert first.bound is None
    torch.testing.assert_close(third.bound.bound.sigmoid(), torch.full((8,), 0.5))


def test_decays_of_a_step_begin_where_mamba_2_has_them():
    decay = StepDecay(1000, 1000)
    rate, step = decay.A_log.exp(), F.softplus(decay.dt_bias)
    assert 1 <= rate.min() < 1.2
    assert 15.8 < rate.max() <= 16.001
    assert 0.00099 <= step.min() < 0.0011
    assert 0.09 < step.max() <= 0.1001


def test_retentions_decays_are_the_papers():
    assert [pytest.approx(1 - 2.0 ** (-5 - h)) for h in range(3)] == torch.tensor(log_decays(3)).exp().tolist()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LinearConfig(heads=6, kv_heads=4), "kv_heads: 6 query heads are not a multiple of 4 key/value heads"),
        (LinearConfig(heads=5), "heads: 5 heads do not divide dim 12; set head_dim or change heads"),
        (LinearConfig(heads=2, feature_map="silu"), "normalize: silu has negative features, whose sum may be 0"),
        (RetentionConfig(heads=4), "head_dim: 3 has to be even for rotary embedding"),
        (Mamba2Config(heads=5), "heads: 5 heads do not divide 2 * dim 24"),
        (Mamba2Config(heads=4, groups=3), "groups: 3 groups do not divide 4 heads"),
        (Mamba2Config(heads=4, dt_min=0.2, dt_max=0.1), "dt_min: 0.2 is above dt_max, 0.1"),
        (MIXERS["E"](heads=4, qk_heads=3), "qk_heads: 4 heads are not a multiple of 3 query/key heads"),
        (MIXERS["G"](heads=4), "heads: 4 heads do not divide dim / 2 = 6; set head_dim"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told_with_its_key(config, problem):
    (found,) = config.problems(12)
    assert found.startswith(problem)


def test_flops_are_those_of_the_parts():
    layout = Layout((0, 3, 10))
    basic = LinearConfig(heads=4, kv_heads=2, head_dim=3).build(8, 0, 1, EPS)
    assert basic.flops(layout) == 10 * (2 * 8 * 24 + 2 * 12 * 8 + 2 * (4 + 2) * 3 * (3 + 1))
    mamba = Mamba2Config(heads=4, head_dim=5, state_dim=7, groups=2).build(8, 0, 1, EPS)
    mixed = 20 + 2 * 14
    assert mamba.flops(layout) == 10 * (2 * 8 * (20 + mixed + 4) + 2 * mixed * 4 + 2 * 20 * 8 + 4 * 4 * 5 * 7)
    kda = CONFIGS["K"].build(8, 0, 1, EPS)
    low = 2 * (8 * 7 + 7 * 15) + 2 * (8 * 7 + 7 * 21)
    assert kda.flops(layout) == 10 * (2 * 8 * (15 + 15 + 21) + 2 * 8 * 3 + low + 2 * 21 * 8 + 2 * 3 * 3 * 5 * 7)

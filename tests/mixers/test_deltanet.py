"""Delta-rule mixers (DeltaNet, Gated DeltaNet, KDA): the layer against its equations."""

import torch

from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.parallel.layout import Layout
from tests.mixers.cases import CONFIGS
from tests.mixers.equations import EPS, check, each_of, heads, low_rank, normed, projected, recurrence, silu


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


EQUATIONS = {"D": deltanet, "E": gated_deltanet, "K": kda}


@each_of("D", "E", "K")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_sizes_that_do_not_fit_are_named_by_their_key():
    (problem,) = GatedDeltaNetConfig(heads=4, qk_heads=3).problems(12)
    assert problem.startswith("qk_heads: 4 heads are not a multiple of 3 query/key heads")


def test_flops_are_those_of_the_parts():
    layout = Layout((0, 3, 10))
    kda = CONFIGS["K"].build(8, 0, 1, EPS)
    low = 2 * (8 * 7 + 7 * 15) + 2 * (8 * 7 + 7 * 21)
    assert kda.flops(layout) == 10 * (2 * 8 * (15 + 15 + 21) + 2 * 8 * 3 + low + 2 * 21 * 8 + 2 * 3 * 3 * 5 * 7)

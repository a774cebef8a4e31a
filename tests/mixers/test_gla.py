"""Gated linear attention: the layer against its equations."""

import torch

from longctx.mixers.gla import GlaConfig
from tests.mixers.equations import check, each_of, heads, low_rank, normed, projected, recurrence, silu


def gla(m, x, c):
    q, k, v = projected(m, x, c.heads)
    log_decay = heads(torch.log(1 / (1 + torch.exp(-low_rank(m.decay, x)))) / 16, c.heads)
    o = recurrence(q / c.head_dim**0.5, k, v, log_decay)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


EQUATIONS = {"G": gla}


@each_of("G")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_sizes_that_do_not_fit_are_named_by_their_key():
    (problem,) = GlaConfig(heads=4).problems(12)
    assert problem.startswith("heads: 4 heads do not divide dim / 2 = 6; set head_dim")

"""Simple GLA: the layer against its equations."""

import torch

from tests.mixers.equations import check, each_of, heads, normed, projected, recurrence, silu


def simple_gla(m, x, c):
    q, k, v = projected(m, x, c.heads)
    log_decay = torch.log(1 / (1 + torch.exp(-x @ m.decay.weight.T))) / 16
    o = recurrence(q / c.head_dim**0.5, k, v, log_decay)
    gate = heads(silu(x @ m.gate.weight.T), c.heads)
    return (normed(o) * m.norm.weight * gate).flatten(2) @ m.out.weight.T


EQUATIONS = {"I": simple_gla}


@each_of("I")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])

"""LightNet: the layer against its equations."""

import itertools

import torch

from tests.mixers.equations import BOUNDS, check, each_of, low_rank, normed, projected, silu


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


EQUATIONS = {"N": lightnet}


@each_of("N")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])

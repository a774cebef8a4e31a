"""HGRN2: the layer against its equations."""

import torch

from longctx.mixers.hgrn2 import Hgrn2Config
from tests.mixers.equations import EPS, check, each_of, heads, normed, projected, recurrence, silu


def hgrn2(m, x, c):
    q, f, v = projected(m, x, c.heads, lambda y: y)
    low = heads(torch.sigmoid(m.bound.bound), c.heads)
    forget = low + (1 - low) * torch.sigmoid(f)
    o = recurrence(silu(q), 1 - forget, v, forget.log())
    return (normed(o.flatten(2)) * m.norm.weight) @ m.out.weight.T


EQUATIONS = {"H": hgrn2}


@each_of("H")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_the_first_layer_has_no_lower_bound_and_the_others_begin_at_their_share_of_the_depth():
    first, third = (Hgrn2Config(heads=2).build(8, layer, 4, EPS) for layer in (0, 2))
    assert first.bound is None
    torch.testing.assert_close(third.bound.bound.sigmoid(), torch.full((8,), 0.5))

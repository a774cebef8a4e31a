"""HGRN2: the layer against its equations."""

import torch

from longctx.mixers.hgrn2 import Hgrn2Config
from longctx.verify.equations.common import LayerContext
from longctx.verify.equations.gated import hgrn2
from tests.mixers.cases import CONFIGS
from tests.mixers.equations import BOUNDS, EPS, check, check_config, each_of

EQUATIONS = {"H": hgrn2}


@each_of("H")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_the_first_layer_equals_its_equations():
    check_config(CONFIGS["H"], hgrn2, LayerContext(BOUNDS, layer=0, depth=4, eps=EPS))


def test_the_first_layer_has_no_lower_bound_and_the_others_begin_at_their_share_of_the_depth():
    first, third = (Hgrn2Config(heads=2).build(8, layer, 4, EPS) for layer in (0, 2))
    assert first.bound is None
    torch.testing.assert_close(third.bound.bound.sigmoid(), torch.full((8,), 0.5))

"""LightNet: the layer against its equations."""

from longctx.verify.equations.gated import lightnet
from tests.mixers.equations import check, each_of

EQUATIONS = {"N": lightnet}


@each_of("N")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])

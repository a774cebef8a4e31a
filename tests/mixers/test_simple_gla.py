"""Simple GLA: the layer against its equations."""

from longctx.verify.equations.gated import simple_gla
from tests.mixers.equations import check, each_of

EQUATIONS = {"I": simple_gla}


@each_of("I")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])

"""Gated linear attention: the layer against its equations."""

from longctx.mixers.gla import GlaConfig
from longctx.verify.equations.gated import gla
from tests.mixers.equations import check, each_of

EQUATIONS = {"G": gla}


@each_of("G")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_sizes_that_do_not_fit_are_named_by_their_key():
    (problem,) = GlaConfig(heads=4).problems(12)
    assert problem.startswith("heads: 4 heads do not divide dim / 2 = 6; set head_dim")

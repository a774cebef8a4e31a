"""Delta-rule mixers (DeltaNet, Gated DeltaNet, KDA): the layer against its equations."""

from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.parallel.layout import Layout
from longctx.verify.equations.delta import deltanet, gated_deltanet, kda
from tests.mixers.cases import CONFIGS
from tests.mixers.equations import EPS, check, each_of

EQUATIONS = {"D": deltanet, "E": gated_deltanet, "K": kda}


@each_of("D", "E", "K")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


def test_sizes_that_do_not_fit_are_named_by_their_key():
    (problem,) = GatedDeltaNetConfig(heads=4, qk_heads=3).problems(12)
    assert problem.startswith("qk_heads: 4 heads are not a multiple of 3 query/key heads")


def test_flops_are_those_of_the_parts():
    layout = Layout((0, 3, 10))
    layer = CONFIGS["K"].build(8, 0, 1, EPS)
    low = 2 * (8 * 7 + 7 * 15) + 2 * (8 * 7 + 7 * 21)
    assert layer.flops(layout) == 10 * (2 * 8 * (15 + 15 + 21) + 2 * 8 * 3 + low + 2 * 21 * 8 + 2 * 3 * 3 * 5 * 7)

"""Mamba-2: the layer against its equations."""

import pytest

from longctx.mixers.mamba2 import Mamba2Config
from longctx.parallel.layout import Layout
from longctx.verify.equations.gated import mamba2
from tests.mixers.equations import EPS, check, each_of

EQUATIONS = {"M": mamba2}


@each_of("M")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Mamba2Config(heads=5), "heads: 5 heads do not divide 2 * dim 24"),
        (Mamba2Config(heads=4, groups=3), "groups: 3 groups do not divide 4 heads"),
        (Mamba2Config(heads=4, dt_min=0.2, dt_max=0.1), "dt_min: 0.2 is above dt_max, 0.1"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named_by_their_key(config, message):
    (problem,) = config.problems(12)
    assert problem.startswith(message)


def test_flops_are_those_of_the_parts():
    layout = Layout((0, 3, 10))
    mamba = Mamba2Config(heads=4, head_dim=5, state_dim=7, groups=2).build(8, 0, 1, EPS)
    mixed = 20 + 2 * 14
    assert mamba.flops(layout) == 10 * (2 * 8 * (20 + mixed + 4) + 2 * mixed * 4 + 2 * 20 * 8 + 4 * 4 * 5 * 7)

"""Linear attention with feature maps: the layer against its equations."""

import pytest
import torch

from longctx.mixers.linear import LinearConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.verify.equations.common import parameters_of
from longctx.verify.equations.constant_decay import linear
from tests.mixers.cases import DIM
from tests.mixers.equations import BOUNDS, CONTEXT, EPS, check, draw, each_of

EQUATIONS = {"B": linear}


@each_of("B")
def test_layer_and_gradients_equal_the_equations(letter):
    check(letter, EQUATIONS[letter[0]])


@pytest.mark.parametrize("name", ["identity", "relu", "silu", "elu1"])
def test_feature_maps_without_a_denominator(name):
    config, x = LinearConfig(heads=2, head_dim=5, feature_map=name, normalize=False), draw()
    mixer = config.build(DIM, 0, 1, EPS).double()
    initialise(mixer, seed=5)
    want = linear(parameters_of(mixer), x, config, CONTEXT)
    torch.testing.assert_close(mixer(x, Layout(BOUNDS)), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LinearConfig(heads=6, kv_heads=4), "kv_heads: 6 query heads are not a multiple of 4 key/value heads"),
        (LinearConfig(heads=5), "heads: 5 heads do not divide dim 12; set head_dim or change heads"),
        (LinearConfig(heads=2, feature_map="silu"), "normalize: silu has negative features, whose sum may be 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named_by_their_key(config, message):
    (problem,) = config.problems(12)
    assert problem.startswith(message)


def test_flops_are_those_of_the_parts():
    layout = Layout((0, 3, 10))
    basic = LinearConfig(heads=4, kv_heads=2, head_dim=3).build(8, 0, 1, EPS)
    assert basic.flops(layout) == 10 * (2 * 8 * 24 + 2 * 12 * 8 + 2 * (4 + 2) * 3 * (3 + 1))


def test_a_normalizer_on_long_sequences_is_warned_of():
    assert LinearConfig(heads=2).warning(2**14 - 1) is None
    assert "model.linear.normalize: on 131072 tokens" in LinearConfig(heads=2).warning(2**17)
    assert LinearConfig(heads=2, normalize=False).warning(2**20) is None

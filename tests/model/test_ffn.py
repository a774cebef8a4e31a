"""The feed-forward layers."""

import pytest
import torch

from longctx.kernels import reference
from longctx.layers.output import Output
from longctx.model.ffn import SwigluConfig
from longctx.model.ffn_registry import FFNS
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.parallel.layout import Layout


def test_swiglu_equals_its_equation():
    layer = SwigluConfig(hidden=7).build(5, 0, 3).double()
    initialise(layer, seed=0)
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = reference.swiglu(x @ layer.gate_up.weight.T) @ layer.down.weight.T
    torch.testing.assert_close(layer(x, Layout((0, 9))), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dim", "hidden"), [(24, 64), (25, 128), (768, 2048), (4096, 10944)])
def test_hidden_width_is_8_3_of_the_width_rounded_up_to_64(dim, hidden):
    with torch.device("meta"):
        layer = SwigluConfig().build(dim, 0, 1)
    assert layer.down.in_features == hidden


CONFIGS = {"swiglu": SwigluConfig(), "moe": MoeConfig(experts=6, active=2, hidden=9, shared=2)}


@pytest.mark.parametrize("name", FFNS)
def test_every_feed_forward_is_known_by_its_name_and_shrinks(name):
    assert FFNS[name].name == name
    small = CONFIGS[name].shrunk()
    assert type(small) is FFNS[name]
    assert small.problems() == []
    layer = small.build(32, 0, 2)
    initialise(layer, seed=0)
    assert Output.of(layer(torch.zeros(1, 3, 32), Layout((0, 3)))).out.shape == (1, 3, 32)


def test_flops_are_those_of_the_experts_that_a_token_takes():
    layer = MoeConfig(experts=6, active=2, hidden=9, shared=2).build(32, 0, 2)
    router, expert = 6 * 32, 3 * 9 * 32
    assert layer.flops_per_token == 2 * (router + 2 * expert + 2 * expert)
    assert SwigluConfig(hidden=9).build(32, 0, 2).flops_per_token == 2 * expert

"""The feed-forward layers."""

import pytest
import torch

from longctx.kernels import reference
from longctx.model.ffn import FFNS, SwigluConfig
from longctx.model.initialise import initialise


def test_swiglu_equals_its_equation():
    layer = SwigluConfig(hidden=7).build(5, 3).double()
    initialise(layer, seed=0)
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = reference.swiglu(x @ layer.gate_up.weight.T) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("dim", "hidden"), [(24, 64), (25, 128), (768, 2048), (4096, 10944)])
def test_hidden_width_is_8_3_of_the_width_rounded_up_to_64(dim, hidden):
    with torch.device("meta"):
        layer = SwigluConfig().build(dim, 1)
    assert layer.down.in_features == hidden


@pytest.mark.parametrize("name", FFNS)
def test_every_feed_forward_is_known_by_its_name_and_shrinks(name):
    kind = FFNS[name]
    assert kind.name == name
    small = kind().shrunk()
    assert type(small) is kind
    layer = small.build(32, 2)
    assert layer(torch.zeros(1, 3, 32)).shape == (1, 3, 32)
    assert layer.flops_per_token == sum(2 * p.numel() for p in layer.parameters())

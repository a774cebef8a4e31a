"""Equations of feed-forwards: layers, their losses and gradients equal them, with every option."""

import pytest
import torch

from longctx.model.ffn import SwigluConfig
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.parallel.layout import Layout
from longctx.verify.equations.common import LayerContext, parameters_of
from longctx.verify.equations.experts import moe, swiglu

DIM = 6
CONTEXT = LayerContext((0, 1, 9, 21), layer=1, depth=4, eps=1e-5, sequence=3)
LAYOUT = Layout(CONTEXT.bounds, sequence=CONTEXT.sequence)
OPTIONS = [
    {"shared": 2},
    {"shared": 1, "shared_hidden": 9, "shared_gate": True},
    {"active": 1, "normalize": False, "scale": 2.5},
    {"score": "sigmoid", "z": 0.2, "bias_rate": 0.1},
    {"groups": 3, "active_groups": 2, "active": 3},
    {"capacity": 0.8},
    {"jitter": 0.4},
    {"router": "similarity", "similarity_dim": 3, "temperature": 0.5, "jitter": 0.2},
    {"router": "similarity", "score": "sigmoid"},
]


def draw():
    return torch.randn(1, 21, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(config):
    layer = config.build(DIM, CONTEXT.layer, CONTEXT.depth).double()
    initialise(layer, seed=3)
    return layer


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_a_mixture_of_experts_equals_its_equations(changes):
    config = MoeConfig(**({"experts": 6, "active": 2, "hidden": 5, "balance": 0.3} | changes))
    layer, x = built(config), draw()
    if layer.bias is not None:
        layer.bias.copy_(torch.linspace(-0.2, 0.2, 6))
    dy, results = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape), []
    got = layer(x, LAYOUT)
    for out, loss in ((got.out, got.report.loss), moe(parameters_of(layer), x, config, CONTEXT, None)):
        layer.zero_grad()
        ((out * dy).sum() + loss).backward()
        results.append([out.detach(), loss.detach(), *(p.grad for p in layer.parameters())])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-12)
    assert ("capacity" in changes) == bool(got.report.dropped)


@pytest.mark.parametrize("hidden", [None, 10])
def test_swiglu_equals_its_equation(hidden):
    config, x = SwigluConfig(hidden=hidden), draw()
    layer = built(config)
    want, loss = swiglu(parameters_of(layer), x, config, CONTEXT, None)
    torch.testing.assert_close(layer(x, LAYOUT), want, rtol=1e-12, atol=1e-13)
    assert loss is None
    with pytest.raises(ValueError, match="the hidden width of a feed-forward is"):
        swiglu(parameters_of(layer), x, SwigluConfig(hidden=11), CONTEXT, None)

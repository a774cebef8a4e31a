"""Comparison of a layer with its equations (`longctx.verify.equations`): the documents, the inputs, the bounds."""

from collections.abc import Callable

import pytest
import torch

from longctx.layers.output import Output
from longctx.mixers import MixerConfig
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.verify.equations.common import LayerContext, Parameters, parameters_of
from tests.mixers.cases import DIM, OPTIONS, config_of

BOUNDS = (0, 1, 30, 69, 80)
EPS = 1e-3
CONTEXT = LayerContext(BOUNDS, layer=1, depth=4, eps=EPS)

Equations = Callable[[Parameters, torch.Tensor, MixerConfig, LayerContext], torch.Tensor]


def draw():
    return torch.randn(2, BOUNDS[-1], DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def each_of(*letters: str) -> pytest.MarkDecorator:
    """Parametrize with mixers and the options that they have in `tests.mixers.cases`."""
    return pytest.mark.parametrize("letter", [*letters, *(option for option in OPTIONS if option[0] in letters)])


def check(letter: str, equations: Equations) -> None:
    """Outputs and gradients of the layer equal those of its equations."""
    check_config(config_of(letter), equations)


def check_config(config: MixerConfig, equations: Equations, context: LayerContext = CONTEXT) -> None:
    """The same for a configuration."""
    mixer, x = config.build(DIM, context.layer, context.depth, context.eps).double(), draw()
    initialise(mixer, seed=5)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (
        lambda: Output.of(mixer(x, Layout(context.bounds))).out,
        lambda: equations(parameters_of(mixer), x, config, context),
    ):
        mixer.zero_grad()
        y = function()
        y.backward(dy)
        results.append([y.detach(), *(p.grad for p in mixer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)

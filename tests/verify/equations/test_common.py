"""Parts of the equations: which tensors of a layer they read, and the formulas that have known values."""

import ast
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from longctx.verify import equations
from longctx.verify.equations.common import (
    LayerContext,
    attention_weights,
    convolved,
    expect_size,
    low_rank,
    normed,
    parameters_of,
    rotary_frequencies,
    rotated,
    visible,
    weighted_norm,
)

CONTEXT = LayerContext((0, 1, 4, 6), layer=0, depth=1, eps=1e-5)
ALLOWED = {
    "longctx.config": "the base class of configurations",
    "longctx.errors": "UserError",
    "longctx.kernels.linear.reference": "the recurrence, token by token",
}
"""Modules of longctx that the equations may call."""
CONFIGURATIONS = ("longctx.mixers", "longctx.model")
"""Packages of which they may use configurations, and the decoder, whose parameters they read."""


@pytest.mark.parametrize("file", sorted(Path(equations.__path__[0]).glob("*.py")), ids=lambda file: file.name)
def test_equations_call_nothing_that_they_are_compared_with(file):
    for node in ast.walk(ast.parse(file.read_text())):
        assert not isinstance(node, ast.Import) or not any(name.name.startswith("longctx") for name in node.names)
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("longctx."):
            continue
        names = {name.name for name in node.names}
        ours = node.module.startswith("longctx.verify.")
        configuration = node.module.startswith(CONFIGURATIONS) and all(name.endswith("Config") for name in names)
        built = (file.name, node.module) in {
            ("decoder.py", "longctx.model.decoder"),
            ("step.py", "longctx.model.decoder"),
            ("step.py", "longctx.model.initialise"),
        }
        assert ours or configuration or built or node.module in ALLOWED, node.module


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 3)
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("derived", torch.ones(1), persistent=False)


def test_parameters_are_the_layers_own_and_derived_buffers_are_not_among_them():
    layer = Layer()
    p = parameters_of(layer)
    assert p.inner.weight is layer.inner.weight
    assert vars(p).keys() == {"inner", "kept"}


def test_a_size_that_differs_from_the_configuration_is_named():
    p = parameters_of(nn.ModuleDict({"down": nn.Linear(4, 3, bias=False), "up": nn.Linear(3, 5, bias=False)}))
    assert low_rank(p, torch.ones(1, 4), 3).shape == (1, 5)
    with pytest.raises(ValueError, match="equations: the rank of a projection is 3 in the model, and 2 by its"):
        low_rank(p, torch.ones(1, 4), 2)
    expect_size("the width", 3, 3)


def test_norms():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert normed(x, 0.0).tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])
    assert normed(x, 3.5).tolist() == pytest.approx([3 / 4, 4 / 4])
    weight = torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert weighted_norm(x, weight, "rms", 3.5).tolist() == pytest.approx([1.5, -1])
    assert weighted_norm(x, weight, "zero_centered_rms", 3.5).tolist() == pytest.approx([2.25, 0])


def test_a_convolution_does_not_cross_documents():
    conv = nn.Module()
    conv.weight, conv.bias = nn.Parameter(torch.tensor([[100.0, 10.0, 1.0]])), nn.Parameter(torch.tensor([0.5]))
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    y = convolved(x, parameters_of(conv), CONTEXT, 3, lambda y: y, bias=True).flatten().tolist()
    assert y == [1.5, 2.5, 23.5, 234.5, 5.5, 56.5]


def test_positions_count_from_the_start_of_each_document():
    x = torch.tensor([1.0, 0.0, 7.0], dtype=torch.float64).expand(1, 6, 1, 3)
    cos, sin, kept = rotated(x, CONTEXT, [0.5])[0, :, 0].T.tolist()
    positions = [0, 0, 1, 2, 0, 1]
    assert cos == pytest.approx([math.cos(t / 2) for t in positions])
    assert sin == pytest.approx([math.sin(t / 2) for t in positions])
    assert kept == [7.0] * 6
    assert rotary_frequencies(16.0, 4) == [1.0, 0.25]


def test_a_query_sees_earlier_tokens_of_its_document_within_the_window():
    rows = [[0], [1], [1, 2], [1, 2, 3], [4], [4, 5]]
    assert [row.nonzero()[:, 0].tolist() for row in visible(CONTEXT)] == rows
    assert [row.nonzero()[:, 0].tolist() for row in visible(CONTEXT, 2)] == [r[-2:] for r in rows]


def test_query_heads_read_the_key_head_of_their_group():
    q, k = torch.randn(1, 6, 4, 3), torch.randn(1, 6, 2, 3)
    weights = attention_weights(q, k, visible(CONTEXT), 0.7)
    assert weights.shape == (1, 4, 6, 6)
    want = (0.7 * k[0, 1:4, 1] @ q[0, 3, 2]).softmax(dim=0)
    torch.testing.assert_close(weights[0, 2, 3, 1:4], want)
    assert weights[0, 2, 3, [0, 4, 5]].tolist() == [0, 0, 0]

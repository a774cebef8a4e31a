"""An operator that is registered is opaque to torch.compile and counted by FlopCounterMode."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.operator import register

SIGNATURE = "(Tensor x, int factor) -> Tensor"


def scaled(x, factor):
    return x * factor


def shape_of(x, factor):
    return torch.empty_like(x)


BY_SHAPE = register("test_by_shape", SIGNATURE, scaled, shape_of, lambda x, factor, out_shape: x[0] * factor)
BY_VALUE = register("test_by_value", SIGNATURE, scaled, shape_of, lambda x, factor, out_val: int(x.sum()), values=True)


@pytest.mark.parametrize(("operator", "flops"), [(BY_SHAPE, 3 * 2), (BY_VALUE, 6)], ids=["shapes", "values"])
def test_its_operations_are_counted_by_shapes_or_values(operator, flops):
    x = torch.tensor([1.0, 2.0, 3.0])
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(operator(x, 2), 2 * x)
    assert counter.get_total_flops() == flops


def test_the_compiler_takes_it_whole():
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: BY_SHAPE(x, 2) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))
    assert BY_SHAPE in seen

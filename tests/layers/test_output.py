"""Output of a layer: a tensor is wrapped, and an `Output` stays as it is."""

import torch

from longctx.layers.output import Output


def test_a_tensor_is_wrapped_without_a_report_and_without_attention():
    out = torch.zeros(1, 2, 3)
    wrapped = Output.of(out)
    assert wrapped.out is out
    assert wrapped.report is None
    assert wrapped.attend is None


def test_an_output_stays_the_same_object():
    output = Output(torch.zeros(1, 2, 3), attend=lambda r, cache: r)
    assert Output.of(output) is output

"""The additive recurrence as it is registered: its gate, the update of its state and its FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.additive.recurrence import decayed
from longctx.kernels.linear.recurrence import Inputs, Segment
from tests.kernels.linear.cases import draw

F64 = torch.float64


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def inputs_of(case):
    return Inputs(case.q, case.k, case.v, case.gates)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)], ids=["scalar", "vector"])
def test_a_decayed_state_is_multiplied_per_head_or_per_key_channel(shape):
    state, log_decay = normal(2, 3, 4, 5), -normal(*shape).abs()
    got = decayed(state, log_decay)
    for head in range(3):
        for channel in range(4):
            g = log_decay[1, head] if len(shape) == 2 else log_decay[1, head, channel]
            torch.testing.assert_close(got[1, head, channel], state[1, head, channel] * g.exp(), rtol=1e-14, atol=0)


def test_the_update_decays_the_state_and_adds_the_outer_product_of_key_and_value():
    state, k, v = (
        normal(1, 1, 2, 3),
        torch.tensor([[[2.0, -1.0]]], dtype=F64),
        torch.tensor([[[1.0, 0.5, 3.0]]], dtype=F64),
    )
    write = torch.tensor([[2.0, 1.0, 6.0], [-1.0, -0.5, -3.0]], dtype=F64)
    assert torch.equal(ADDITIVE.update_state(state, k, v)[0, 0], state[0, 0] + write)
    half = torch.tensor([[0.5]], dtype=F64).log()
    torch.testing.assert_close(ADDITIVE.update_state(state, k, v, log_decay=half)[0, 0], state[0, 0] / 2 + write)


@pytest.mark.parametrize(("kind", "dims"), [("no decay", ()), ("constant", ()), ("scalar", ()), ("vector", (5,))])
def test_transition_dims_are_those_of_a_summary(kind, dims):
    case = draw(kind, 6)
    assert ADDITIVE.transition_dims(inputs_of(case)) == dims
    assert ADDITIVE.summarize(inputs_of(case), [Segment(0, 6)]).transition.shape == (1, 2, 3, *dims)


def test_the_gate_is_optional_and_may_be_constant():
    k = torch.zeros(2, 6, 3, 5)
    ADDITIVE.check_gates({}, k)
    for shape in ((3,), (2, 6, 3), (2, 6, 3, 5)):
        ADDITIVE.check_gates({"log_decay": -torch.ones(shape)}, k)
        with pytest.raises(ValueError, match="log_decay has the largest value 1"):
            ADDITIVE.check_gates({"log_decay": torch.ones(shape)}, k)
    assert ADDITIVE.gate_names == ("log_decay",)
    assert ADDITIVE.required_gates == 0


def test_flops_of_a_summary_are_one_write_per_token_and_state_and_backward_one_read_per_query():
    case = draw("scalar", 6, heads=(6, 3, 3, 3))
    product = 2 * 2 * 6 * 5 * 7
    with FlopCounterMode(display=False) as counter:
        ADDITIVE.summarize(inputs_of(case), [Segment(0, 6)])
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:
        ADDITIVE.summarize_grad(inputs_of(case), [Segment(0, 6)], case.do)
    assert counter.get_total_flops() == 6 * product

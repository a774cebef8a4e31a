"""The delta rule as it is registered: its gates, the update of its state and its FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.recurrence import Inputs, Segment
from tests.kernels.linear.cases import draw

F64 = torch.float64


def inputs_of(case):
    return Inputs(case.q, case.k, case.v, case.gates)


def one(*values):
    return torch.tensor(values, dtype=F64)


def test_the_update_moves_the_stored_value_towards_the_new_one_by_beta():
    """The state stores (1, 2) for the first key channel, and keeps what it stores for the second."""
    state = one([1.0, 2.0], [3.0, 4.0])[None, None]
    k, v = one(1.0, 0.0)[None, None], one(5.0, 10.0)[None, None]
    for beta, stored in ((0.0, [1.0, 2.0]), (0.5, [3.0, 6.0]), (1.0, [5.0, 10.0]), (2.0, [9.0, 18.0])):
        got = DELTA.update_state(state, k, v, beta=one(beta)[None])
        assert got[0, 0].tolist() == [stored, [3.0, 4.0]]


@pytest.mark.parametrize("log_decay", [[0.5], [0.5, 0.25]], ids=["scalar", "vector"])
def test_the_state_decays_before_it_is_read_at_the_key(log_decay):
    state = one([1.0, 2.0], [3.0, 4.0])[None, None]
    k, v, beta = one(0.6, 0.8)[None, None], one(5.0, 10.0)[None, None], one(0.75)[None]
    decay = one(*log_decay)
    gate = decay.log()[None] if len(log_decay) == 1 else decay.log()[None, None]
    got = DELTA.update_state(state, k, v, beta=beta, log_decay=gate)
    transition = (torch.eye(2, dtype=F64) - 0.75 * torch.outer(k[0, 0], k[0, 0])) @ torch.diag(decay.expand(2))
    want = transition @ state[0, 0] + 0.75 * torch.outer(k[0, 0], v[0, 0])
    torch.testing.assert_close(got[0, 0], want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["delta", "delta, scalar", "delta, vector"])
def test_the_transition_of_a_segment_is_a_matrix(kind):
    case = draw(kind, 6)
    assert DELTA.transition_dims(inputs_of(case)) == (5, 5)
    assert DELTA.summarize(inputs_of(case), [Segment(0, 6)]).transition.shape == (1, 2, 3, 5, 5)


def test_beta_is_required_and_log_decay_is_not_constant():
    k, beta = torch.zeros(2, 6, 3, 5), torch.ones(2, 6, 3)
    assert (DELTA.gate_names, DELTA.required_gates) == (("beta", "log_decay"), 1)
    DELTA.check_gates({"beta": beta}, k)
    for shape in ((2, 6, 3), (2, 6, 3, 5)):
        DELTA.check_gates({"beta": beta, "log_decay": -torch.ones(shape)}, k)
    for gates, message in (
        ({"beta": torch.ones(3)}, r"beta has shape \[3\]"),
        ({"beta": beta, "log_decay": -torch.ones(3)}, r"log_decay has shape \[3\]"),
        ({"beta": beta, "log_decay": torch.ones(2, 6, 3)}, "log_decay has the largest value 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DELTA.check_gates(gates, k)


def test_flops_of_a_summary_count_the_transition_as_k_more_value_channels():
    case = draw("delta", 6, heads=(6, 3, 3, 3))
    tokens, wide = 2 * 6, 7 + 5
    with FlopCounterMode(display=False) as counter:
        DELTA.summarize(inputs_of(case), [Segment(0, 6)])
    assert counter.get_total_flops() == 2 * (2 * tokens * 3 * 5 * wide)
    with FlopCounterMode(display=False) as counter:
        DELTA.summarize_grad(inputs_of(case), [Segment(0, 6)], case.do)
    assert counter.get_total_flops() == 2 * (2 * tokens * 3 * 5 * wide) + 2 * tokens * 6 * 5 * 7

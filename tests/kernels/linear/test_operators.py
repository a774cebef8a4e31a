"""Registered operators of a recurrence: how segments are encoded, which module runs, gates, the step and FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.linear import operators
from longctx.kernels.linear.additive import ADDITIVE, chunked
from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.linear.reference import linear_recurrence
from tests.kernels.linear.cases import draw, named_gates

SEGMENTS = [Segment(0, 4, (0, 3)), Segment(4, 4), Segment(4, 9, (2,))]


def inputs_of(case):
    return Inputs(case.q, case.k, case.v, case.gates)


@pytest.mark.parametrize("segments", [[], SEGMENTS[:1], SEGMENTS])
def test_decoding_inverts_the_encoding_of_segments(segments):
    numbers = operators._encode(segments)
    assert all(type(n) is int for n in numbers)
    assert operators._decode(numbers) == segments


def test_an_operator_runs_the_torch_module_on_a_cpu():
    case = draw("scalar", 9)
    states = torch.stack([case.state] * 3)
    want = chunked.apply(inputs_of(case), SEGMENTS, states)
    got = torch.ops.longctx.additive_apply(
        case.q, case.k, case.v, list(case.gates), operators._encode(SEGMENTS), states
    )
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
    carry = ADDITIVE.summarize(inputs_of(case), SEGMENTS)
    assert torch.equal(carry.state, chunked.summarize(inputs_of(case), SEGMENTS).state)


def test_query_gradients_are_none_where_a_recurrence_has_no_such_function():
    case = draw("delta", 9)
    assert DELTA.query_grad(inputs_of(case), [Segment(0, 9)], case.do, case.state[None]) is None
    case = draw("scalar", 9)
    assert ADDITIVE.query_grad(inputs_of(case), [Segment(0, 9)], case.do, case.state[None]).shape == case.q.shape


@pytest.mark.parametrize(("kind", "count"), [("no decay", 0), ("scalar", 1), ("delta, scalar", 2)])
def test_gate_gradients_are_none_one_per_gate_where_none_is_needed(kind, count):
    case = draw(kind, 9)
    arguments = inputs_of(case), [Segment(0, 9)], case.do, case.state[None], case.dend[None]
    assert case.recurrence.apply_grad(*arguments, False)[3] == (None,) * count
    assert [g.shape for g in case.recurrence.apply_grad(*arguments, True)[3]] == [g.shape for g in case.gates]


def test_segments_are_decoded_once_for_all_layers_and_passes(monkeypatch):
    decoded, decode = [], operators._decode
    monkeypatch.setattr(operators, "_decode", lambda numbers: decoded.append(numbers) or decode(numbers))
    operators._decode_once.cache_clear()
    case = draw("scalar", 9)
    segments = [Segment(0, 4, (1,)), Segment(4, 9)]
    for _ in range(3):
        carries = case.recurrence.summarize(inputs_of(case), segments)
        case.recurrence.apply(inputs_of(case), segments, carries.state)
    assert len(decoded) == 1


def test_gates_are_named_in_order_and_the_last_may_be_omitted():
    case = draw("delta, vector", 3)
    beta, log_decay = case.gates
    assert DELTA.named_gates(inputs_of(case)) == {"beta": beta, "log_decay": log_decay}
    assert DELTA.named_gates(Inputs(case.q, case.k, case.v, (beta,))) == {"beta": beta}
    with pytest.raises(ValueError, match="delta recurrence has 0 gates: expected beta and log_decay"):
        DELTA.named_gates(Inputs(case.q, case.k, case.v, ()))
    with pytest.raises(ValueError, match="additive recurrence has 2 gates: expected log_decay"):
        ADDITIVE.named_gates(inputs_of(case))


def test_the_check_covers_operands_gates_and_heads():
    case = draw("scalar", 4)
    q, k, v, (g,) = case.q, case.k, case.v, case.gates
    ADDITIVE.check(Inputs(q, k, v, (g,)))
    ADDITIVE.check(Inputs(None, k, v, (g,)))
    for arguments, message in (
        ((q, k, v.float(), (g,)), "v is torch.float32"),
        ((None, k, v.float(), (g,)), "v is torch.float32"),
        ((q, k, v, (1 - g,)), "log_decay has the largest value"),
        ((q, k[:, :, :2], v, (g,)), "k has 2 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            ADDITIVE.check(Inputs(*arguments))


@pytest.mark.parametrize("heads", [(3, 3, 3, 3), (6, 1, 3, 3), (1, 2, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", ["no decay", "constant", "delta, vector"])
def test_a_step_is_one_token_of_the_recurrence(kind, heads):
    case = draw(kind, 1, heads=heads)
    out, state = case.recurrence.step(inputs_of(case), case.state)
    gates = named_gates(case, case.gates)
    want, end = linear_recurrence(case.q, case.k, case.v, **gates, initial_state=case.state)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-13)


def test_a_step_of_bfloat16_tokens_updates_a_float32_state():
    case = draw("scalar", 1).to(torch.bfloat16)
    out, state = ADDITIVE.step(inputs_of(case), case.state)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    double = case.to(torch.float64)
    _, end = linear_recurrence(double.q, double.k, double.v, double.gates[0], initial_state=double.state)
    torch.testing.assert_close(state.double(), end, rtol=1e-6, atol=1e-6)


def test_one_segment_is_the_whole_length_on_a_cpu():
    for recurrence in (ADDITIVE, DELTA):
        assert recurrence.segment_length(4, 1000, torch.device("cpu")) == 1000
        assert recurrence.segment_length(4, 0, torch.device("cpu")) == 1


@pytest.mark.parametrize(("kind", "writes"), [("scalar", 1), ("delta", 2)])
def test_flops_are_two_k_v_per_read_and_per_product_over_a_state(kind, writes):
    case = draw(kind, 9, heads=(6, 3, 3, 3))
    arguments = inputs_of(case), [Segment(0, 9)]
    product = 2 * 2 * 9 * case.q.shape[3] * case.v.shape[3]
    reads, updates = 6 * product, 3 * writes * product
    for function, rest, want in (
        (case.recurrence.apply, (case.state[None],), reads + updates),
        (case.recurrence.apply_grad, (case.do, case.state[None], case.dend[None], True), 2 * (reads + updates)),
    ):
        with FlopCounterMode(display=False) as counter:
            function(*arguments, *rest)
        assert counter.get_total_flops() == want


def test_flops_of_separate_query_and_key_value_gradients_sum_to_those_of_the_backward_pass():
    case = draw("scalar", 9, heads=(6, 3, 3, 3))
    arguments = inputs_of(case), [Segment(0, 9)], case.do
    with FlopCounterMode(display=False) as separate:
        ADDITIVE.query_grad(*arguments, case.state[None])
        ADDITIVE.key_value_grad(*arguments, case.dend[None])
    with FlopCounterMode(display=False) as together:
        ADDITIVE.apply_grad(*arguments, case.state[None], case.dend[None], True)
    assert separate.get_total_flops() == together.get_total_flops() > 0

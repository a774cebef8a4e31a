"""The chunkwise delta rule in torch operators against the token-by-token reference and its transition matrices."""

import pytest
import torch

from longctx.kernels.linear.delta import chunked
from longctx.kernels.linear.recurrence import Inputs, Segment
from tests.kernels.linear.cases import by_recurrence, by_reference, draw, relative

KINDS = ("delta", "delta, scalar", "delta, vector")
each_kind = pytest.mark.parametrize("kind", KINDS)
SEGMENTS = [Segment(0, 30), Segment(30, 70, (9,))]


def inputs_of(case):
    return Inputs(case.q, case.k, case.v, case.gates)


def check(case, segments, starts):
    got, again = by_recurrence(case, segments, module=chunked)
    for name, want in by_reference(case, starts).items():
        assert got[name].shape == want.shape, name
        assert relative(got[name], want) < 1e-11 or got[name].norm() == want.norm() == 0, name
    for name, (second, first) in again.items():
        torch.testing.assert_close(second, first, rtol=1e-11, atol=1e-11, msg=name)


@each_kind
def test_values_and_gradients_equal_the_reference_over_a_ragged_chunk_and_a_document_start(kind):
    check(draw(kind, 70, batch=1, heads=(2, 2, 2, 2)), SEGMENTS, (39,))


def test_query_heads_may_share_states_that_share_keys_and_values():
    check(draw("delta, vector", 70, batch=1, heads=(4, 1, 2, 2)), [Segment(0, 70, (64,))], (64,))


@each_kind
def test_one_token_equals_the_reference(kind):
    check(draw(kind, 1), [Segment(0, 1)], ())


def test_keys_need_not_have_length_one():
    case = draw("delta, scalar", 70, batch=1)
    case.k.mul_(0.5)
    check(case, [Segment(0, 70)], ())


def test_recomputed_states_equal_kept_ones(monkeypatch):
    case = draw("delta, vector", 70, batch=1, heads=(2, 2, 2, 2))
    want, _ = by_recurrence(case, SEGMENTS, module=chunked)
    monkeypatch.setattr(chunked, "CHUNK", 16)
    monkeypatch.setattr(chunked, "CHUNKS_PER_CHECKPOINT", 1)
    got, _ = by_recurrence(case, SEGMENTS, module=chunked)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-10, atol=1e-10, msg=name)


@each_kind
def test_transitions_are_products_of_householder_matrices_and_decays_and_zero_where_a_document_starts(kind):
    case = draw(kind, 70, batch=1, heads=(1, 1, 1, 1))
    transition = chunked.summarize(Inputs(None, case.k, case.v, case.gates), SEGMENTS).transition
    want = eye = torch.eye(5, dtype=torch.float64)
    for t in range(30):
        k = case.k[0, t, 0]
        decay = case.gates[1][0, t, 0].exp() if len(case.gates) > 1 else torch.ones((), dtype=torch.float64)
        want = (eye - case.gates[0][0, t, 0] * torch.outer(k, k)) @ (decay.expand(5)[:, None] * want)
    torch.testing.assert_close(transition[0, 0, 0], want, rtol=1e-11, atol=1e-12)
    assert not transition[1].any()


def test_the_backward_transition_is_the_transpose():
    case = draw("delta, vector", 70, batch=1, heads=(2, 2, 2, 2))
    forward = chunked.summarize(inputs_of(case), SEGMENTS).transition
    backward = chunked.summarize_grad(inputs_of(case), SEGMENTS, case.do).transition
    torch.testing.assert_close(backward, forward.transpose(-1, -2), rtol=1e-11, atol=1e-12)


def test_without_gate_gradients_the_others_are_the_same():
    case = draw("delta, scalar", 70, batch=1, heads=(2, 2, 2, 2))
    states, dends = torch.stack([case.state, 2 * case.state]), torch.stack([case.dend, -case.dend])
    want = chunked.apply_grad(inputs_of(case), SEGMENTS, case.do, states, dends, True)
    got = chunked.apply_grad(inputs_of(case), SEGMENTS, case.do, states, dends, False)
    assert got[3] == (None,) * len(case.gates)
    assert [g.shape for g in want[3]] == [g.shape for g in case.gates]
    for x, y in zip((*got[:3], got[4]), (*want[:3], want[4]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_results_of_bfloat16_tokens_are_cast_once_and_states_are_float32():
    case = draw("delta, scalar", 70, batch=1, heads=(2, 2, 2, 2)).to(torch.bfloat16)
    got, _ = by_recurrence(case, SEGMENTS, module=chunked)
    want = by_reference(case.to(torch.float64), (39,))
    for name in ("o", "dq", "dk", "dv"):
        assert got[name].dtype == torch.bfloat16, name
        assert relative(got[name].double(), want[name]) < 4e-3, name
    for name in ("end", "dstate"):
        assert got[name].dtype == torch.float32, name
        assert relative(got[name].double(), want[name]) < 2e-5, name


def test_a_segment_is_as_long_as_the_sequence_and_never_empty():
    assert [chunked.segment_length(8, length, torch.device("cpu")) for length in (0, 1, 5000)] == [1, 1, 5000]

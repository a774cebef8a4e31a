"""The chunkwise additive recurrence in torch operators against the token-by-token reference."""

import pytest
import torch

from longctx.kernels.linear.additive import chunked
from longctx.kernels.linear.recurrence import Inputs, Segment
from tests.kernels.linear.cases import by_recurrence, by_reference, draw, relative

KINDS = ("no decay", "constant", "scalar", "vector")
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
    check(draw("vector", 70, batch=1, heads=(4, 1, 2, 2)), [Segment(0, 70, (64,))], (64,))


@each_kind
def test_one_token_equals_the_reference(kind):
    check(draw(kind, 1), [Segment(0, 1)], ())


def test_recomputed_states_equal_kept_ones(monkeypatch):
    case = draw("vector", 70, batch=1, heads=(2, 2, 2, 2))
    want, _ = by_recurrence(case, SEGMENTS, module=chunked)
    for name in ("CHUNK", "VECTOR_CHUNK"):
        monkeypatch.setattr(chunked, name, 16)
    monkeypatch.setattr(chunked, "CHUNKS_PER_CHECKPOINT", 1)
    got, _ = by_recurrence(case, SEGMENTS, module=chunked)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-11, atol=1e-11, msg=name)


@each_kind
def test_transitions_are_sums_of_log_decays_and_minus_infinity_where_a_document_starts(kind):
    case = draw(kind, 70)
    transition = chunked.summarize(Inputs(None, case.k, case.v, case.gates), SEGMENTS).transition
    if kind == "no decay":
        want = torch.zeros(2, 3, dtype=torch.float64)
    elif kind == "constant":
        want = (30 * case.gates[0]).expand(2, -1)
    else:
        want = case.gates[0][:, :30].sum(dim=1)
    torch.testing.assert_close(transition[0], want, rtol=1e-12, atol=1e-12)
    assert torch.isneginf(transition[1]).all()
    backward = chunked.summarize_grad(inputs_of(case), SEGMENTS, case.do)
    assert torch.equal(backward.transition, transition)


def test_summaries_read_only_the_tokens_that_reach_the_other_end():
    case, other = draw("scalar", 70, batch=1, heads=(2, 2, 2, 2)), draw("scalar", 70, batch=1, heads=(2, 2, 2, 2))
    segment = [Segment(0, 70, (9,))]
    other.k[:, :9], other.v[:, :9] = 1.0, 2.0
    want = chunked.summarize(inputs_of(case), segment).state
    assert torch.equal(chunked.summarize(Inputs(None, other.k, other.v, case.gates), segment).state, want)
    other.q[:, 9:], other.do[:, 9:] = 1.0, 2.0
    other.k.fill_(torch.nan)
    other.v.fill_(torch.nan)
    want = chunked.summarize_grad(inputs_of(case), segment, case.do).state
    assert torch.equal(chunked.summarize_grad(inputs_of(other), segment, other.do).state, want)


def test_separate_query_and_key_value_gradients_equal_the_backward_pass():
    case = draw("scalar", 70, batch=1, heads=(2, 2, 2, 2))
    states, dends = torch.stack([case.state, 2 * case.state]), torch.stack([case.dend, -case.dend])
    *want, dgates, dstates = chunked.apply_grad(inputs_of(case), SEGMENTS, case.do, states, dends, True)
    dq = chunked.query_grad(inputs_of(case), SEGMENTS, case.do, states)
    got = (dq, *chunked.key_value_grad(inputs_of(case), SEGMENTS, case.do, dends))
    for x, y in zip(got, (*want, dstates), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    without = chunked.apply_grad(inputs_of(case), SEGMENTS, case.do, states, dends, False)
    for x, y in zip((*without[:3], without[4]), got, strict=True):
        assert torch.equal(x, y)
    assert without[3] == (None,) * len(dgates)


def test_results_of_bfloat16_tokens_are_cast_once_and_states_are_float32():
    case = draw("scalar", 70, batch=1, heads=(2, 2, 2, 2)).to(torch.bfloat16)
    got, _ = by_recurrence(case, SEGMENTS, module=chunked)
    want = by_reference(case.to(torch.float64), (39,))
    for name in ("o", "dq", "dk", "dv"):
        assert got[name].dtype == torch.bfloat16, name
        assert relative(got[name].double(), want[name]) < 4e-3, name
    for name in ("end", "dstate"):
        assert got[name].dtype == torch.float32, name
        assert relative(got[name].double(), want[name]) < 1e-5, name


def test_a_segment_is_as_long_as_the_sequence_and_never_empty():
    assert [chunked.segment_length(8, length, torch.device("cpu")) for length in (0, 1, 5000)] == [1, 1, 5000]

"""The delta rule in C++ against that in torch operators in float64, on every layout of heads and documents."""

import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from longctx.kernels.linear.delta import chunked, native
from longctx.kernels.linear.delta.recurrence import DELTA
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.native import library
from tests.kernels.linear.cases import GROUPS, by_recurrence, draw, relative

pytestmark = pytest.mark.skipif(
    not library.is_enabled() or library.load(native.FAMILY) is None, reason="needs a C++ compiler"
)
KINDS = ("delta", "delta, scalar", "delta, vector")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SEGMENTS = [Segment(0, 70), Segment(70, 210, (9, 75, 76)), Segment(210, 210), Segment(210, 300)]
BOUND = 2e-6


def check(case, segments, bound=BOUND, **narrower):
    """Values and gradients in float32 against float64; `narrower` bounds by name."""
    narrow = case.to(torch.float32)
    got, again = by_recurrence(narrow, segments, module=native)
    wanted, _ = by_recurrence(narrow.to(torch.float64), segments, module=chunked)
    for name, want in wanted.items():
        assert got[name].shape == want.shape, name
        limit = narrower.get(name, bound)
        assert relative(got[name].double(), want) < limit or got[name].norm() == want.norm() == 0, name
    for name, (second, first) in again.items():
        assert relative(second.double(), first.double()) < bound, name


@each_kind
@pytest.mark.parametrize(("key_dim", "value_dim"), [(5, 7), (16, 16), (33, 17), (64, 100), (128, 128)])
def test_values_and_gradients_of_any_width(kind, key_dim, value_dim):
    check(draw(kind, 300, 1, (2, 2, 2, 2), key_dim, value_dim), SEGMENTS)


@each_kind
@pytest.mark.parametrize("heads", GROUPS.values(), ids=GROUPS)
def test_heads_may_be_shared(kind, heads):
    check(draw(kind, 130, 2, heads), [Segment(0, 130, (64,))])


@each_kind
@pytest.mark.parametrize("length", [1, 5, 16, 17, 63, 64, 65, 128])
def test_chunks_may_be_ragged(kind, length):
    check(draw(kind, length), [Segment(0, length)])


@each_kind
@pytest.mark.parametrize("starts", [(0,), (1,), (199,), tuple(range(0, 200, 3)), tuple(range(200))])
def test_documents_start_anywhere(kind, starts):
    check(draw(kind, 200, 1), [Segment(0, 200, starts)])


@each_kind
def test_blocks_of_chunks_whose_states_are_recomputed(kind):
    """More chunks than are in memory at the same time, and the last block is not whole."""
    length = 64 * 150 + 9
    check(draw(kind, length, 1, (2, 1, 1, 1)), [Segment(0, length)])


@each_kind
def test_a_state_that_hardly_decays_stays_accurate(kind):
    """Over hundreds of chunks, whose tokens hardly read the state: each would round the sum if it were in float32."""
    length = 1 << 14
    case = draw(kind, length, 1, (1, 1, 1, 1), 4, 4)
    case = replace(case, gates=(1e-5 * case.gates[0], *(1e-7 * gate for gate in case.gates[1:])))
    check(case, [Segment(0, length)], o=3e-7)  # 4e-7 where the state is in float32


@each_kind
@each_dtype
def test_what_decays_by_nothing_keeps_every_bit(kind, dtype):
    """Tokens that write nothing, with log-decays of 0."""
    length = 64 * 40
    case = draw(kind, length, 1).to(dtype)
    gates = tuple(torch.zeros_like(gate) for gate in case.gates)
    _, ends = native.apply(Inputs(case.q, case.k, case.v, gates), [Segment(0, length)], case.state[None])
    assert torch.equal(ends[0], case.state)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_strong_decays(kind):
    case = draw(kind, 200, strong=True)
    check(case, [Segment(0, 200, (50,))])
    dropping = torch.where(case.gates[1] < -100, float("-inf"), case.gates[1])
    got, _ = by_recurrence(
        replace(case, gates=(case.gates[0], dropping)).to(torch.float32), [Segment(0, 200)], module=native
    )
    assert all(x.isfinite().all() for x in got.values())


@each_kind
def test_keys_that_are_alike_and_betas_of_two(kind):
    """The triangular system then has the largest inverse that is stable."""
    case = draw(kind, 210, 1, (2, 2, 2, 2), 16, 16)
    k = torch.nn.functional.normalize(0.1 * case.k + case.k[:, :1], dim=-1)
    check(replace(case, k=k, gates=(torch.full_like(case.gates[0], 1.9), *case.gates[1:])), SEGMENTS[:2], 2e-5)


def check_bfloat16(case, segments, bound):
    """Values and gradients of bfloat16 inputs against float64."""
    got, again = by_recurrence(case.to(torch.bfloat16), segments, module=native)
    wanted, _ = by_recurrence(case.to(torch.bfloat16).to(torch.float64), segments, module=chunked)
    for name, want in wanted.items():
        sums = name in ("end", "dstate", "dlog_decay", "dbeta")
        assert got[name].dtype == (torch.float32 if sums else torch.bfloat16), name
        assert relative(got[name].double(), want) < bound, name
    for name, (second, first) in again.items():
        assert relative(second.double(), first.double()) < bound, name


@pytest.mark.parametrize(("kind", "bound"), [("delta", 6e-3), ("delta, scalar", 4e-3), ("delta, vector", 4e-3)])
@pytest.mark.parametrize("heads", [(3, 3, 3, 3), (6, 3, 1, 3)])
def test_bfloat16_factors_are_rounded_once(kind, bound, heads):
    """An output is off by what rounding it costs, 1.7e-3, and by what is rounded before products.

    Without a decay more of it, since the state keeps it until other keys overwrite it.
    """
    check_bfloat16(draw(kind, 300, 1, heads, 33, 40), SEGMENTS, bound)


@each_kind
def test_the_error_of_bfloat16_does_not_grow_with_the_length(kind):
    """Even where little decays but by what keys overwrite: the state and its sums are float32."""
    length = 1 << 13
    case = draw(kind, length, 1, (1, 1, 1, 1), 32, 32)
    gates = (case.gates[0], *(1e-3 * gate for gate in case.gates[1:]))
    check_bfloat16(replace(case, gates=gates), [Segment(0, length)], 1e-2)


@each_kind
def test_odd_chunks_of_bfloat16_read_nothing_behind_them(kind):
    """Rows are multiplied in pairs: the row after an odd number of tokens counts as zero."""
    case = draw(kind, 135, 1).to(torch.bfloat16)
    want, _ = by_recurrence(case.cut(0, 131), [Segment(0, 131)], module=native)
    for x in (case.q, case.k, case.v, case.do, *case.gates):
        x[:, 131:] = torch.nan
    got, _ = by_recurrence(case, [Segment(0, 131)], module=native)
    for name, x in want.items():
        among = got[name][:, :131] if got[name].shape[1] == 135 else got[name]
        assert torch.equal(among, x), name


@each_kind
def test_gates_may_be_narrow(kind):
    """Gradients of gates are sums in float32, rounded once."""
    case = draw(kind, 130, 1).to(torch.float32)
    narrow = tuple(gate.bfloat16() for gate in case.gates)
    got, _ = by_recurrence(replace(case, gates=narrow), [Segment(0, 130)], module=native)
    want, _ = by_recurrence(replace(case, gates=tuple(g.float() for g in narrow)), [Segment(0, 130)], module=native)
    for name, x in want.items():
        assert torch.equal(got[name], x.to(got[name].dtype)), name
    assert got["dbeta"].dtype == torch.bfloat16


@each_kind
def test_gates_without_gradients_change_nothing_else(kind):
    case = draw(kind, 130).to(torch.float32)
    want, _ = by_recurrence(case, [Segment(0, 130)], module=native)
    got, _ = by_recurrence(case, [Segment(0, 130)], gate_grads=False, module=native)
    for name in ("dq", "dk", "dv", "dstate"):
        assert torch.equal(got[name], want[name]), name
    assert got["dbeta"] is None


@each_kind
@each_dtype
def test_tensors_need_not_be_contiguous(kind, dtype):
    case = draw(kind, 130).to(dtype)
    want, _ = by_recurrence(case, [Segment(0, 130)], module=native)

    def head_major(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def interleaved(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]

    for change in (head_major, interleaved):
        tokens = {name: change(getattr(case, name)) for name in ("q", "k", "v", "do")}
        changed = replace(case, **tokens, gates=tuple(change(gate) for gate in case.gates))
        got, _ = by_recurrence(changed, [Segment(0, 130)], module=native)
        for name, x in want.items():
            assert torch.equal(got[name], x), name


@each_kind
@each_dtype
def test_the_number_of_threads_changes_no_bit(kind, dtype):
    case = draw(kind, 2100, 2, (3, 3, 3, 3), 32, 32).to(dtype)
    found, segments = [], [*SEGMENTS[:2], Segment(210, 2100)]
    for count in (1, 2, 5, 64):
        with patch.object(torch, "get_num_threads", return_value=count):
            values, _ = by_recurrence(case, segments, module=native)
        found.append(values)
    for other in found[1:]:
        assert all(torch.equal(other[name], x) for name, x in found[0].items())


@each_kind
def test_tokens_in_no_segment_are_left_as_they_are(kind):
    """What is not asked for is not read either."""
    case = draw(kind, 200).to(torch.float32)
    for x in (case.q, case.k, case.v, case.do, *case.gates):
        x[:, :20] = x[:, 150:] = torch.nan
    got, _ = by_recurrence(case, [Segment(20, 150)], module=native)
    assert got["o"][:, 20:150].isfinite().all()
    assert got["end"].isfinite().all()
    assert all(got[name][:, 20:150].isfinite().all() for name in got if name[0] == "d" and name != "dstate")


@each_kind
@each_dtype
def test_a_token_that_is_not_finite_reaches_no_earlier_token_and_no_other_document(kind, dtype):
    """By the operators, which wrap the passes."""
    case = draw(kind, 200).to(dtype)
    segments = [Segment(0, 200, (50, 120))]
    want, _ = by_recurrence(case, segments)
    for x in (case.k, case.v, *case.gates):
        kept = x[0, 70].clone()
        x[0, 70] = torch.nan
        got, _ = by_recurrence(case, segments)
        x[0, 70] = kept
        for at in (slice(0, 70), slice(120, 200)):
            assert torch.equal(got["o"][:, at], want["o"][:, at])
        assert got["o"][0, 70:120].isnan().all()
        for at in (slice(0, 50), slice(120, 200)):
            assert all(torch.equal(got[name][:, at], want[name][:, at]) for name in ("dq", "dk", "dv", "dbeta"))


def test_the_operators_call_it(monkeypatch):
    called = []
    monkeypatch.setattr(native, "apply", lambda *args: called.append(args) or chunked.apply(*args))
    case = draw("delta", 5).to(torch.float32)
    DELTA.apply(Inputs(case.q, case.k, case.v, case.gates), [Segment(0, 5)], case.state[None])
    assert called


@pytest.mark.parametrize(
    ("kind", "dtype", "switch"),
    [("delta, vector", "float64", "1"), ("delta", "float32", "0")],
)
def test_what_it_does_not_take_runs_in_torch(kind, dtype, switch):
    case = draw(kind, 70).to(getattr(torch, dtype))
    with patch.dict(os.environ, {library.SWITCH: switch}), patch.object(native, "Pass", side_effect=AssertionError):
        got, _ = by_recurrence(case, [Segment(0, 70)], module=native)
    want, _ = by_recurrence(case, [Segment(0, 70)], module=chunked)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_no_memory_is_an_error():
    case = draw("delta", 70).to(torch.float32)
    failing = type("Library", (), {"delta_apply": staticmethod(lambda call: 1)})
    inputs = Inputs(case.q, case.k, case.v, case.gates)
    with patch.object(library, "load", lambda family: failing), pytest.raises(MemoryError, match="delta_apply"):
        native.apply(inputs, [Segment(0, 70)], case.state[None])

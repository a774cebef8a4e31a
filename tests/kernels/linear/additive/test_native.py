"""The additive recurrence in C++ against that in torch operators in float64, on every layout of heads and documents."""

import os
from unittest.mock import patch

import pytest
import torch

from longctx.kernels.linear.additive import chunked, native
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.native import library
from tests.kernels.linear.cases import GROUPS, by_recurrence, draw, relative

pytestmark = pytest.mark.skipif(
    not library.is_enabled() or library.load(native.FAMILY) is None, reason="needs a C++ compiler"
)
KINDS = ("no decay", "constant", "scalar", "vector")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SEGMENTS = [Segment(0, 70), Segment(70, 210, (9, 75, 76)), Segment(210, 210), Segment(210, 300)]
BOUND = 2e-6


def check(case, segments, bound=BOUND):
    """Values and gradients in float32 against float64."""
    narrow = case.to(torch.float32)
    got, again = by_recurrence(narrow, segments, module=native)
    wanted, _ = by_recurrence(narrow.to(torch.float64), segments, module=chunked)
    for name, want in wanted.items():
        assert got[name].shape == want.shape, name
        # A constant decay's gradient is a sum over all tokens that cancels.
        limit = 5 * bound if name == "dlog_decay" and want.dim() == 1 else bound
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
@pytest.mark.parametrize("length", [1, 5, 6, 63, 64, 65, 128])
def test_chunks_may_be_ragged(kind, length):
    check(draw(kind, length), [Segment(0, length)])


@each_kind
@pytest.mark.parametrize("starts", [(0,), (1,), (199,), tuple(range(0, 200, 3)), tuple(range(200))])
def test_documents_start_anywhere(kind, starts):
    check(draw(kind, 200, 1), [Segment(0, 200, starts)])


@each_kind
def test_blocks_of_chunks_whose_states_are_recomputed(kind):
    """More chunks than between two kept states, and the last block is not whole."""
    check(draw(kind, 64 * 35 + 9, 1, (2, 1, 1, 1)), [Segment(0, 64 * 35 + 9)])


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_strong_decays(kind):
    check(draw(kind, 200, strong=True), [Segment(0, 200, (50,))])


@each_kind
@pytest.mark.parametrize("heads", [(3, 3, 3, 3), (6, 3, 1, 3)])
def test_bfloat16_factors_are_rounded_once(kind, heads):
    """An output is off by what rounding it costs, 1.7e-3, and as much again for what is rounded before a product."""
    case = draw(kind, 300, 1, heads, 33, 40).to(torch.bfloat16)
    got, again = by_recurrence(case, SEGMENTS, module=native)
    wanted, _ = by_recurrence(case.to(torch.float64), SEGMENTS, module=chunked)
    for name, want in wanted.items():
        sums = name in ("end", "dstate", "dlog_decay")
        assert got[name].dtype == (torch.float32 if sums else torch.bfloat16), name
        assert relative(got[name].double(), want) < 4e-3, name
    for name, (second, first) in again.items():
        assert relative(second.double(), first.double()) < 4e-3, name


def test_the_state_of_bfloat16_tokens_is_float32():
    """Without a decay, sums of products that are exact in float32: what 64 chunks add is not rounded to bfloat16."""
    case = draw("no decay", 64 * 64, 1, (1, 1, 1, 1), 32, 32).to(torch.bfloat16)
    got, _ = by_recurrence(case, [Segment(0, 64 * 64)], module=native)
    wanted, _ = by_recurrence(case.to(torch.float64), [Segment(0, 64 * 64)], module=chunked)
    for name in ("end", "dstate"):
        assert relative(got[name].double(), wanted[name]) < 1e-6, name


@each_kind
def test_odd_chunks_of_bfloat16_read_nothing_behind_them(kind):
    """Rows are multiplied in pairs: the row after an odd number of tokens counts as zero."""
    case = draw(kind, 135, 1).to(torch.bfloat16)
    longer = case.cut(0, 131)
    want, _ = by_recurrence(longer, [Segment(0, 131)], module=native)
    for x in (case.q, case.k, case.v, case.do, *(g for g in case.gates if g.dim() > 1)):
        x[:, 131:] = torch.nan
    got, _ = by_recurrence(case, [Segment(0, 131)], module=native)
    for name, x in want.items():
        among = got[name][:, :131] if got[name].dim() > 2 and got[name].shape[1] == 135 else got[name]
        assert torch.equal(among, x), name


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
        gates = tuple(change(gate) if gate.dim() > 1 else gate for gate in case.gates)
        got, _ = by_recurrence(type(case)(**vars(case) | tokens | {"gates": gates}), [Segment(0, 130)], module=native)
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


def test_tokens_in_no_segment_are_left_as_they_are(monkeypatch):
    """What is not asked for is not read either."""
    case = draw("scalar", 200).to(torch.float32)
    for x in (case.q, case.k, case.v, case.do, *case.gates):
        x[:, :20] = x[:, 150:] = torch.nan
    segments = [Segment(20, 150)]
    out, ends = native.apply(Inputs(case.q, case.k, case.v, case.gates), segments, case.state[None])
    assert out[:, 20:150].isfinite().all()
    assert ends.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "dtype", "switch"), [("vector", "float64", "1"), ("scalar", "float64", "1"), ("scalar", "float32", "0")]
)
def test_what_it_does_not_take_runs_in_torch(kind, dtype, switch):
    case = draw(kind, 70).to(getattr(torch, dtype))
    with patch.dict(os.environ, {library.SWITCH: switch}), patch.object(native, "Pass", side_effect=AssertionError):
        got, _ = by_recurrence(case, [Segment(0, 70)], module=native)
    want, _ = by_recurrence(case, [Segment(0, 70)], module=chunked)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_no_memory_is_an_error():
    case = draw("scalar", 70).to(torch.float32)
    failing = type("Library", (), {"additive_apply": staticmethod(lambda call: 1)})
    inputs = Inputs(case.q, case.k, case.v, case.gates)
    with patch.object(library, "load", lambda family: failing), pytest.raises(MemoryError, match="additive_apply"):
        native.apply(inputs, [Segment(0, 70)], case.state[None])

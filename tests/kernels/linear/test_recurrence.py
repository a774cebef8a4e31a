"""The chunked recurrences against the token-by-token reference."""

import gc
import itertools
import weakref

import pytest
import torch

from longctx.kernels.linear import reference
from longctx.kernels.linear.recurrence import Carry, Inputs, Segment, compose
from longctx.kernels.native import library
from tests.combinations import mostly_slow, mostly_slow_rows, pairs_first
from tests.kernels.linear.cases import GROUPS, KINDS, by_recurrence, by_reference, draw, named_gates, relative

LENGTHS = [1, 2, 63, 64, 65, 128, 200]
STARTS = {
    "none": lambda length: (),
    "at 0": lambda length: (0,),
    "inside": lambda length: tuple(sorted({length // 3, length // 2, length - 1})),
    "every token": lambda length: tuple(range(length)),
    "chunk edges": lambda length: tuple(x for x in (0, 63, 64, 65, 128, 129) if x < length),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def check(case, segments, starts, bound):
    got, again = by_recurrence(case, segments)
    for name, want in by_reference(case, starts).items():
        assert relative(got[name], want) < bound or got[name].norm() == want.norm() == 0, name
    for name, (second, first) in again.items():
        assert relative(second, first) < bound or first.norm() < 1e-200, name


@pytest.mark.parametrize(("kind", "length", "starts"), pairs_first(list(KINDS), LENGTHS, list(STARTS)))
def test_forward_and_backward_equal_the_reference(kind, length, starts):
    starts = STARTS[starts](length)
    check(draw(kind, length), [Segment(0, length, starts)], starts, 1e-11)


@pytest.mark.parametrize(
    ("heads", "kind"),
    mostly_slow_rows(
        itertools.product(GROUPS, KINDS),
        lambda heads, kind: kind in ("constant", "vector", "delta, vector") or heads == "gates alone",
    ),
)
def test_heads_may_share_keys_values_gates_and_states(kind, heads):
    check(draw(kind, 70, heads=GROUPS[heads]), [Segment(0, 70, (33,))], (33,), 1e-11)


@each_kind
@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (16, 3), (3, 16), (24, 40)])
def test_head_dims_of_any_size(kind, key_dim, value_dim):
    check(draw(kind, 67, batch=1, key_dim=key_dim, value_dim=value_dim), [Segment(0, 67, (20,))], (20,), 1e-11)


class Counted(int):
    """A number that counts how often it is compared."""

    compared = 0

    def __lt__(self, other):
        Counted.compared += 1
        return int(self) < other

    def __le__(self, other):
        Counted.compared += 1
        return int(self) <= other

    def __gt__(self, other):
        Counted.compared += 1
        return int(self) > other

    def __ge__(self, other):
        Counted.compared += 1
        return int(self) >= other


def test_cutting_takes_time_in_segments_plus_documents():
    starts = tuple(map(Counted, range(0, 1 << 20, 64)))
    parts = Segment(0, 1 << 20, starts).cut(2048)
    assert [len(part.starts) for part in parts] == [32] * 512
    assert parts[3].starts == tuple(range(0, 2048, 64))
    assert Counted.compared <= 40 * len(parts)


@each_kind
def test_segments_that_follow_each_other_are_one(kind):
    starts = (50, 51, 120)
    segments = Segment(0, 50).cut(13) + Segment(50, 90, (0, 1)).cut(7) + [Segment(90, 91), Segment(91, 200, (29,))]
    check(draw(kind, 200), segments, starts, 1e-11)


@pytest.mark.parametrize(("strong", "starts", "kind"), pairs_first([False, True], [(), (40, 100)], list(KINDS)))
def test_float32_stays_within_1e_5_also_where_a_decay_is_exp_minus_10000(kind, starts, strong):
    case = draw(kind, 300, heads=(2, 2, 2, 2), key_dim=16, value_dim=16, strong=strong)
    low = case.to(torch.float32)
    got, _ = by_recurrence(low, [Segment(0, 300, starts)])
    for name, want in by_reference(low.to(torch.float64), starts).items():
        assert torch.isfinite(got[name]).all(), name
        assert got[name].dtype == torch.float32, name
        assert relative(got[name].double(), want) < 1e-5 or want.norm() < 1e-30, name


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "constant", "vector", "delta, vector"))
def test_bfloat16_tokens_have_a_float32_state(kind, monkeypatch):
    """The torch form, whose products are in float32; native kernels have bounds of their own."""
    monkeypatch.setenv(library.SWITCH, "0")
    case = draw(kind, 300, key_dim=32, value_dim=32).to(torch.bfloat16)
    got, _ = by_recurrence(case, [Segment(0, 300, (70,))])
    for name, want in by_reference(case.to(torch.float64), (70,)).items():
        state = name in ("end", "dstate")
        gates = name in ("dlog_decay", "dbeta")
        assert got[name].dtype == (torch.float32 if state or gates else torch.bfloat16), name
        assert relative(got[name].double(), want) < (1e-5 if state or gates else 5e-3), name


@each_kind
def test_gate_gradients_that_nobody_wants_are_not_made_and_change_nothing(kind):
    case = draw(kind, 130)
    with_gates, _ = by_recurrence(case, [Segment(0, 130)])
    without, _ = by_recurrence(case, [Segment(0, 130)], gate_grads=False)
    for name, want in with_gates.items():
        gate = name in ("dlog_decay", "dbeta")
        assert without[name] is None if gate else relative(without[name], want) < 1e-14, name


@each_kind
def test_gradcheck_of_the_reference(kind):
    case = draw(kind, 4, batch=1, heads=(2, 2, 2, 2), key_dim=2, value_dim=3)
    inputs = [x.requires_grad_() for x in (*case.tokens, case.state)]

    def loop(q, k, v, *rest):
        *gates, state = rest
        gates = named_gates(case, gates)
        return reference.linear_recurrence(q, k, v, **gates, starts=(2,), initial_state=state)

    assert torch.autograd.gradcheck(loop, inputs)


@pytest.mark.parametrize("kind", ["scalar", "vector", "delta, vector"])
def test_combine_is_associative_through_resets(kind):
    case = draw(kind, 30)
    segments = [Segment(0, 10), Segment(10, 20, (3,)), Segment(20, 30)]
    carry = case.recurrence.summarize(Inputs(None, case.k, case.v, case.gates), segments)
    a, b, c = (carry[n] for n in range(3))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert isinstance(left, Carry)
    torch.testing.assert_close(left.state, right.state)
    torch.testing.assert_close(left.transition, right.transition)
    whole = case.recurrence.summarize(Inputs(None, case.k, case.v, case.gates), [Segment(0, 30, (13,))])[0]
    torch.testing.assert_close(left.state, whole.state)
    torch.testing.assert_close(left.carry_over(case.state), whole.carry_over(case.state))


def test_a_reset_drops_even_a_state_that_is_not_finite():
    case = draw("scalar", 5)
    carry = case.recurrence.summarize(Inputs(None, case.k, case.v, case.gates), [Segment(0, 5, (2,))])[0]
    assert torch.equal(carry.transition, torch.full((2, 3), float("-inf"), dtype=torch.float64))


@each_kind
@pytest.mark.parametrize("t", [0, 59, 63, 64, 127, 199])
def test_changing_a_token_leaves_earlier_outputs_bitwise_unchanged(kind, t):
    case = draw(kind, 200).to(torch.float32)
    segments, states = [Segment(0, 200, (60,))], case.state[None]
    before, _ = case.recurrence.apply(Inputs(case.q, case.k, case.v, case.gates), segments, states)
    for x in (case.q, case.k, case.v):
        x[:, t] = 100 * torch.randn_like(x[:, t])
    for gate in case.gates:
        if gate.dim() > 1:
            gate[:, t] *= 1.5
    after, _ = case.recurrence.apply(Inputs(case.q, case.k, case.v, case.gates), segments, states)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@each_kind
def test_strided_inputs_give_the_same_and_no_input_is_changed(kind):
    case = draw(kind, 130, batch=1)
    want, _ = by_recurrence(case, [Segment(0, 130, (3,))])
    copies = [x.clone() for x in (*case.tokens, case.do, case.state, case.dend)]
    wide = [torch.cat([x, x], dim=-1) if x.dim() == 4 else x for x in (case.q, case.k, case.v, case.do)]
    q, k, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[3] // 2] for x in wide)
    strided = type(case)(case.kind, q, k, v, case.gates, case.state, do, case.dend)
    got, _ = by_recurrence(strided, [Segment(0, 130, (3,))])
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)
    for x, copy in zip((*case.tokens, case.do, case.state, case.dend), copies, strict=True):
        assert torch.equal(x, copy)


@each_kind
def test_nothing_holds_a_result_but_who_asked_for_it(kind):
    case = draw(kind, 70)
    gc.disable()
    try:
        (got, again) = by_recurrence(case, [Segment(0, 70, (20,))])
        results = [weakref.ref(x) for x in got.values()]
        del got, again
        assert [result() for result in results] == [None] * len(results)
    finally:
        gc.enable()


@each_kind
def test_no_token_leaves_the_state_as_it_is(kind):
    case = draw(kind, 3)
    empty = case.cut(0, 0)
    out, ends = case.recurrence.apply(Inputs(empty.q, empty.k, empty.v, empty.gates), [Segment(0, 0)], case.state[None])
    assert out.shape == (2, 0, 3, 7)
    assert torch.equal(ends[0], case.state)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "length"), list(itertools.product(KINDS, [129, 511, 1025])))
def test_long_ragged_sequences_with_documents_of_chance(kind, length):
    generator = torch.Generator().manual_seed(length)
    starts = tuple(sorted(set(torch.randint(length, (9,), generator=generator).tolist())))
    case = draw(kind, length, heads=(4, 2, 4, 4), key_dim=24, value_dim=17)
    check(case, Segment(0, length, starts).cut(300), starts, 1e-10)

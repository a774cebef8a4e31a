"""The Triton kernels of the additive recurrence against the token-by-token reference in float64.

On a GPU they run there; elsewhere in Triton's interpreter, on CPU tensors (tests/conftest.py asks for it).
"""

import itertools
import multiprocessing
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from longctx.kernels.linear import tuning
from longctx.kernels.linear.additive import triton as additive
from longctx.kernels.linear.recurrence import Carry, Inputs, Segment, exclusive_scan
from longctx.kernels.linear.reference import linear_recurrence
from longctx.kernels.linear.triton_launch import MAX_SEGMENT, LaunchPlan
from tests.combinations import mostly_slow, mostly_slow_rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DECAYS = ["none", "constant", "scalar", "vector"]
GROUPS = [(4, 2, 2, 2), (4, 1, 4, 4), (6, 3, 1, 3), (2, 2, 2, 1), (1, 1, 4, 2)]
"""Heads of q, k, v and the decay."""
pytestmark = [pytest.mark.gpu] if CUDA else []


@dataclass
class Case:
    """The inputs of all functions in float64, and what autograd makes of the reference, segment by segment."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: tuple
    segments: list
    do: torch.Tensor
    states: torch.Tensor
    dends: torch.Tensor

    @classmethod
    def draw(cls, decay, segments, batch=1, heads=(1, 1, 1, 1), dims=(20, 12), strength=2.0, seed=0):
        """`heads` of q, k, v and the decay."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        length = sum(segment.size for segment in segments)
        (query, key, value, gate), (key_dim, value_dim) = heads, dims
        outputs = max(heads)
        q, do = normal(batch, length, query, key_dim), normal(batch, length, outputs, value_dim)
        k, v = normal(batch, length, key, key_dim), normal(batch, length, value, value_dim)
        shape = {"none": None, "constant": (gate,), "scalar": (batch, length, gate)}
        shape = shape.get(decay, (batch, length, gate, key_dim))
        gates = () if shape is None else (-strength * torch.rand(shape, generator=generator, dtype=torch.float64),)
        states = [len(segments), batch, max(key, value, gate if gates else 1), key_dim, value_dim]
        return cls(q, k, v, gates, segments, do, normal(*states), normal(*states))

    def wanted(self):
        """o, ends and the gradients of q, k, v, the decay and states."""
        leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v, self.states, *self.gates)]
        q, k, v, states, *gates = leaves
        out, ends = torch.zeros_like(self.do), []
        for number, segment in enumerate(self.segments):
            along = [gate if gate.dim() == 1 else gate[:, segment.at] for gate in gates]
            part, end = linear_recurrence(
                q[:, segment.at],
                k[:, segment.at],
                v[:, segment.at],
                *along,
                starts=segment.starts,
                initial_state=states[number],
            )
            out = out.index_copy(1, torch.arange(segment.begin, segment.end), part)
            ends.append(end)
        ends = torch.stack(ends)
        grads = torch.autograd.grad([out, ends], leaves, [self.do, self.dends], allow_unused=True)
        # A state that nothing reads has no gradient in autograd's eyes.
        grads = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, leaves, strict=True)]
        return out.detach(), ends.detach(), *grads

    def on_device(self, dtype=torch.float32):
        """q, k, v, gates, do, states, dends as the kernels get them."""
        low = [x.to(DEVICE, dtype) for x in (self.q, self.k, self.v, self.do)]
        wide = [x.to(DEVICE, torch.float32) for x in (self.states, self.dends, *self.gates)]
        return *low[:3], tuple(wide[2:]), low[3], *wide[:2]


def distance(got, want):
    """Relative in norm; absolute where the reference is zero."""
    norm = want.norm()
    return ((got.double().cpu() - want).norm() / (norm if norm > 0 else 1)).item()


def check(case, bound=1e-5, dtype=torch.float32):
    """All functions against the reference."""
    out, ends, dq, dk, dv, dstates, *dgates = case.wanted()
    q, k, v, gates, do, states, dends = case.on_device(dtype)
    got_out, got_ends = additive.apply(Inputs(q, k, v, gates), case.segments, states)
    assert got_out.dtype == dtype
    assert distance(got_out, out) < bound
    assert distance(got_ends, ends) < bound
    carry = additive.summarize(Inputs(None, k, v, gates), case.segments)
    assert distance(carry.carry_over(states), ends) < bound
    back = additive.summarize_grad(Inputs(q, k, v, gates), case.segments, do)
    assert distance(back.carry_over(dends), dstates) < bound
    assert torch.allclose(carry.transition, back.transition)
    *got, got_gates, got_states = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, True)
    for name, ours, want in zip(("dq", "dk", "dv", "dstates"), (*got, got_states), (dq, dk, dv, dstates), strict=True):
        assert distance(ours, want) < bound, name
    for ours, want, gate in zip(got_gates, dgates, gates, strict=True):
        assert ours.shape == gate.shape
        # The terms of a constant decay are as many times larger than their sum as there are tokens.
        assert distance(ours, want) < bound * (10 * q.shape[1] if gate.dim() == 1 else 1)


@pytest.mark.parametrize(
    ("starts", "decay"),
    [
        *(pytest.param((3, 20, 33, 36), decay, id=f"inside-{decay}") for decay in DECAYS),
        pytest.param((), "vector", id="no start-vector"),
        pytest.param((0,), "vector", id="at 0-vector", marks=pytest.mark.slow),
        *(pytest.param((), decay, id=f"no start-{decay}", marks=pytest.mark.slow) for decay in DECAYS[:-1]),
        *(pytest.param((0,), decay, id=f"at 0-{decay}", marks=pytest.mark.slow) for decay in DECAYS[:-1]),
    ],
)
def test_all_passes_equal_the_reference(decay, starts):
    check(Case.draw(decay, [Segment(0, 37, starts)]))


@pytest.mark.parametrize("decay", DECAYS)
def test_without_gradients_of_gates_the_others_are_the_same(decay):
    case = Case.draw(decay, [Segment(0, 20, (7,))])
    q, k, v, gates, do, states, dends = case.on_device()
    with_gates = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, True)
    without = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, False)
    assert without[3] == (None,) * len(gates)
    for got, want in zip((*with_gates[:3], with_gates[4]), (*without[:3], without[4]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("decay", mostly_slow(DECAYS, "constant", "vector"))
def test_segments_in_any_order_of_any_length(decay):
    parts = [
        Segment(40, 57, (0, 5)),
        Segment(0, 1),
        Segment(57, 73, tuple(range(16))),
        Segment(1, 1),
        Segment(1, 40, (38,)),
    ]
    check(Case.draw(decay, parts))


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("starts", ["none", "at 0", "thirds", "every token"])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 70, 130])
def test_lengths_and_starts(decay, starts, length):
    places = {
        "none": (),
        "at 0": (0,),
        "thirds": tuple(sorted({length // 3, 2 * length // 3})),
        "every token": tuple(range(length)),
    }
    check(Case.draw(decay, [Segment(0, length, places[starts])], batch=2))


@pytest.mark.parametrize(
    ("decay", "heads"),
    mostly_slow_rows(
        itertools.product(["vector", "scalar"], GROUPS),
        lambda decay, heads: heads == (6, 3, 1, 3) or (decay, heads) == ("vector", (1, 1, 4, 2)),
    ),
    ids=str,
)
def test_grouped_heads(decay, heads):
    check(Case.draw(decay, [Segment(0, 18, (7,))], heads=heads, dims=(6, 4)))


@pytest.mark.parametrize("decay", ["none", "constant"])
def test_grouped_heads_where_nothing_runs_along_the_sequence(decay):
    check(Case.draw(decay, [Segment(0, 10, (7,))], batch=2, heads=(4, 1, 2, 2), dims=(6, 4)))


@pytest.mark.parametrize(
    ("dims", "decay"),
    mostly_slow_rows(
        itertools.product([(1, 40), (33, 16), (64, 65)], DECAYS),
        lambda dims, decay: decay == "vector" or (dims, decay) in [((1, 40), "constant"), ((64, 65), "scalar")],
    ),
    ids=str,
)
def test_head_dims(decay, dims):
    check(Case.draw(decay, [Segment(0, 19)], dims=dims))


@pytest.mark.parametrize("decay", [pytest.param("scalar", marks=pytest.mark.slow), "vector"])
def test_head_dims_that_take_several_programs(decay):
    check(Case.draw(decay, [Segment(0, 19, (9,))], dims=(136, 129)))


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_decays_from_none_to_all(decay):
    case = Case.draw(decay, [Segment(0, 50), Segment(50, 90, (30,))])
    generator = torch.Generator().manual_seed(3)
    levels = torch.tensor([0.0, -1e-3, -0.5, -30.0, -1e4], dtype=torch.float64)
    case.gates = (levels[torch.randint(5, case.gates[0].shape, generator=generator)],)
    check(case)


def test_constant_decays_from_none_to_all():
    case = Case.draw("constant", [Segment(0, 50)], heads=(4, 4, 4, 4))
    case.gates = (-torch.tensor([0.0, 1e-3, 40.0, 1e4], dtype=torch.float64),)
    check(case)


@pytest.mark.parametrize("decay", mostly_slow(DECAYS, "constant", "vector"))
def test_segments_joined_by_the_scan_are_one_segment(decay):
    whole = [Segment(0, 66, (29,))]
    case = Case.draw(decay, whole)
    q, k, v, gates, do, states, dends = case.on_device()
    parts = whole[0].cut(23)
    out, ends = additive.apply(Inputs(q, k, v, gates), whole, states)
    carry = additive.summarize(Inputs(None, k, v, gates), parts)
    *received, end = exclusive_scan([carry[n] for n in range(len(parts))], states[0])
    assert distance(end, ends[0].double().cpu()) < 1e-5
    assert distance(additive.apply(Inputs(q, k, v, gates), parts, torch.stack(received))[0], out.double().cpu()) < 1e-5
    back = additive.summarize_grad(Inputs(q, k, v, gates), parts, do)
    *flowing, dstate = exclusive_scan([back[n] for n in reversed(range(len(parts)))], dends[0])
    split = additive.apply_grad(
        Inputs(q, k, v, gates), parts, do, torch.stack(received), torch.stack(flowing[::-1]), True
    )
    one = additive.apply_grad(Inputs(q, k, v, gates), whole, do, states, dends, True)
    assert distance(dstate, one[4][0].double().cpu()) < 1e-5
    for got, want in zip(split[:3], one[:3], strict=True):
        assert distance(got, want.double().cpu()) < 1e-5
    for got, want in zip(split[3], one[3], strict=True):
        assert distance(got, want.double().cpu()) < (1e-3 if got.dim() == 1 else 1e-5)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_the_gradient_of_a_decay_that_acts_on_nothing_is_zero(decay):
    case = Case.draw(decay, [Segment(0, 40, (0, 17, 18))])
    q, k, v, gates, do, states, dends = case.on_device()
    (dgate,) = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, True)[3]
    firsts = torch.tensor([0, 17, 18], device=DEVICE)
    assert not dgate[:, firsts].any()
    assert dgate[:, 1:17].abs().amin() > 0


@pytest.mark.parametrize("decay", DECAYS)
def test_changing_a_token_leaves_earlier_outputs_bitwise_unchanged(decay):
    q, k, v, gates, _, states, _ = Case.draw(decay, [Segment(0, 40)]).on_device()
    segments = [Segment(0, 40)]
    before, _ = additive.apply(Inputs(q, k, v, gates), segments, states)
    for x in (q, k, v, *(gate for gate in gates if gate.dim() > 1)):
        x[:, 21] = -100 * torch.rand_like(x[:, 21])
    after, _ = additive.apply(Inputs(q, k, v, gates), segments, states)
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21], after[:, 21])


@pytest.mark.parametrize("decay", [pytest.param("scalar", marks=pytest.mark.slow), "vector"])
def test_strided_inputs_give_the_same_and_stay_as_they_are(decay):
    case = Case.draw(decay, [Segment(0, 12, (3,))], batch=2, heads=(2, 2, 2, 2), dims=(6, 4))
    plain = case.on_device()
    q, k, v, gates, do, states, dends = plain
    # Heads before tokens; channels apart; a part of a wider tensor.
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    k2 = k.transpose(1, 3).contiguous().transpose(1, 3)
    v2 = torch.cat([v, v], dim=-1)[..., : v.shape[-1]]
    gates2 = (gates[0].transpose(1, 2).contiguous().transpose(1, 2),)
    do2 = do.transpose(0, 1).contiguous().transpose(0, 1)
    states2, dends2 = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (states, dends))
    strided = [q2, k2, v2, do2, states2, dends2, *gates2]
    assert not any(x.is_contiguous() for x in strided)
    copies = [x.clone() for x in strided]
    want = additive.apply(Inputs(q, k, v, gates), case.segments, states)
    got = additive.apply(Inputs(q2, k2, v2, gates2), case.segments, states2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    want = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, True)
    got = additive.apply_grad(Inputs(q2, k2, v2, gates2), case.segments, do2, states2, dends2, True)
    for a, b in zip((*got[:3], *got[3], got[4]), (*want[:3], *want[3], want[4]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(strided, copies, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_no_tokens(decay):
    case = Case.draw(decay, [Segment(0, 0)], batch=2)
    q, k, v, gates, do, states, dends = case.on_device()
    out, ends = additive.apply(Inputs(q, k, v, gates), case.segments, states)
    assert out.shape == do.shape
    assert torch.equal(ends, states)
    carry = additive.summarize(Inputs(None, k, v, gates), case.segments)
    assert torch.equal(carry.carry_over(states), states)
    dq, dk, dv, dgates, dstates = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, True)
    assert [x.shape for x in (dq, dk, dv, *dgates)] == [x.shape for x in (q, k, v, *gates)]
    assert torch.equal(dstates, dends)


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_does_not_overflow(decay):
    case = Case.draw(decay, [Segment(0, 40)], strength=0.1)
    case.k, case.q = case.k * 60, case.q * 60
    q, k, v, gates, _, states, _ = case.on_device(torch.float16)
    state = additive.summarize(Inputs(None, k, v, gates), case.segments).carry_over(states)
    assert state.dtype == torch.float32
    exact = Case(q.double().cpu(), k.double().cpu(), v.double().cpu(), case.gates, *list(vars(case).values())[4:])
    assert distance(state, exact.wanted()[1]) < 1e-3
    out, _ = additive.apply(Inputs(q, k, v / 1000, gates), case.segments, states / 1000)
    assert out.isfinite().all()


@pytest.mark.skipif(not CUDA, reason="the interpreter multiplies bf16 wrongly")
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 128)], ids=str)
def test_bfloat16(decay, dims):
    case = Case.draw(decay, [Segment(0, 300, (100,)), Segment(300, 600)], heads=(2, 2, 2, 2), dims=dims)
    for name in ("q", "k", "v", "do"):
        setattr(case, name, getattr(case, name).bfloat16().double())
    check(case, bound=2e-2, dtype=torch.bfloat16)


def test_the_gradient_of_a_constant_decay_counts_only_tokens_in_segments():
    case = Case.draw("constant", [Segment(0, 10), Segment(10, 26, (5,))], heads=(2, 2, 2, 2))
    q, k, v, gates, do, states, dends = case.on_device()
    whole = additive.apply_grad(Inputs(q, k, v, gates), case.segments, do, states, dends, True)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 7)) for x in (q, k, v, do)]
    inputs = Inputs(*padded[:3], gates)
    among_padding = additive.apply_grad(inputs, case.segments, padded[3], states, dends, True)
    assert torch.allclose(among_padding[3][0], whole[3][0])


def test_what_the_kernels_do_not_take_is_refused():
    case = Case.draw("none", [Segment(0, 4)], dims=(4, 4))
    with pytest.raises(ValueError, match="float64"):
        additive.summarize(Inputs(None, case.k, case.v, ()), case.segments)
    wide = torch.zeros(1, 4, 2, tuning.MAX_HEAD_DIM + 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"{tuning.MAX_HEAD_DIM + 1}"):
        additive.summarize(Inputs(None, wide, wide, ()), case.segments)


def test_tf32_is_followed(monkeypatch):
    seen = []
    monkeypatch.setattr(LaunchPlan, "launch", lambda self, *args, **kwargs: seen.append(self.precision))
    k = torch.zeros(1, 4, 1, 4, device=DEVICE)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            additive.summarize(Inputs(None, k, k, ()), [Segment(0, 4)])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert [kind["PRECISION"] for kind in seen] == ["tf32", "tf32x3"]


def precisions(queue):
    seen = []
    LaunchPlan.launch = lambda self, *args, **kwargs: seen.append(self.precision["PRECISION"])
    k = torch.zeros(1, 4, 1, 4)
    for setting in ("tf32", "ieee", "none"):
        torch.backends.cuda.matmul.fp32_precision = setting
        additive.summarize(Inputs(None, k, k, ()), [Segment(0, 4)])
    queue.put(seen)


def test_the_newer_setting_of_tf32_is_followed():
    # In a process of its own: once torch has been told the one way, asking the other way is an error.
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=precisions, args=(queue,))
    process.start()
    assert queue.get(timeout=120) == ["tf32", "tf32x3", "tf32x3"]
    process.join()


def test_segment_length():
    assert additive.segment_length(1, 4096, DEVICE) == 1024
    assert additive.segment_length(64, 2**22, DEVICE) == MAX_SEGMENT


def test_carry_of_a_segment_with_a_start_lets_nothing_through():
    case = Case.draw("vector", [Segment(0, 9), Segment(9, 18, (4,))])
    _, k, v, gates, *_ = case.on_device()
    carry = additive.summarize(Inputs(None, k, v, gates), case.segments)
    assert isinstance(carry, Carry)
    assert distance(carry.transition[0], case.gates[0][:, :9].sum(dim=1)) < 1e-6
    assert torch.isneginf(carry.transition[1]).all()

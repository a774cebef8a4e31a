"""What the delta rule's Triton kernels prepare once for both passes of a direction, and pass on."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from longctx.kernels.linear import operators, tuning
from longctx.kernels.linear.api import Plan, begin_scan, scan_recurrence
from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.delta import triton as delta
from longctx.kernels.linear.delta.triton_prepare import prepare_kernel
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.linear.triton_launch import LaunchPlan
from tests.kernels.linear.cases import by_recurrence, by_reference, draw, relative

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [pytest.mark.gpu] if CUDA else []
STARTS = (20, 33, 64)
INVERSE = 10
"""The place of the inverse among the arguments of `prepare_kernel`."""
each_kind = pytest.mark.parametrize("kind", [pytest.param("delta", marks=pytest.mark.slow), "delta, scalar"])


class Module:
    """The Triton functions as a recurrence, wherever its tensors are, in segments of `size` tokens."""

    def __init__(self, size=40):
        self.size = size

    def __getattr__(self, name):
        return getattr(delta if hasattr(delta, name) else DELTA, name)

    def segment_length(self, heads, length, device):
        return self.size

    def prepare(self, inputs, segments):
        return replace(inputs, prepared=tuple(delta.prepare(replace(inputs, q=None), segments)))


class Prepared:
    """The functions of `delta`, with what `prepare` makes for each direction."""

    def __init__(self, segments):
        self.segments = segments

    def __getattr__(self, name):
        def call(inputs, segments, *rest):
            inputs = Module().prepare(inputs, segments)
            assert [x.shape for x in inputs.prepared] == [x.shape for x in delta.allocate_prepared(inputs, segments)]
            return getattr(delta, name)(inputs, segments, *rest)

        return call


def case_of(kind, length=70):
    case = draw(kind, length, batch=1, heads=(2, 1, 1, 1)).to(torch.float32)
    tensors = {name: getattr(case, name).to(DEVICE) for name in ("q", "k", "v", "state", "do", "dend")}
    return replace(case, gates=tuple(gate.to(DEVICE) for gate in case.gates), **tensors)


@pytest.fixture
def inverted(monkeypatch):
    """Programs of each launch that inverts systems."""
    programs_of, launch = [], LaunchPlan.launch

    def counting(self, kernel, blocks, programs, *arguments, **constants):
        if kernel is prepare_kernel and arguments[INVERSE] is not None:
            programs_of.append(programs)
        launch(self, kernel, blocks, programs, *arguments, **constants)

    monkeypatch.setattr(LaunchPlan, "launch", counting)
    return programs_of


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("delta, scalar", 1),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (("delta", 0), ("delta", 1), ("delta", 2), ("delta, scalar", 0), ("delta, scalar", 2))
        ),
    ],
)
def test_passes_give_the_same_from_what_is_prepared_of_any_number_of_segments(kind, kept, monkeypatch):
    case, segments = case_of(kind), Segment(0, 70, STARTS).cut(40)
    want, _ = by_recurrence(case, segments, module=delta)
    call = delta._Call(Inputs(None, case.k, case.v, case.gates), segments, queries=False)
    monkeypatch.setattr(delta, "SCRATCH", kept * call.prepared_bytes + 1)
    prepared = delta.prepare(Inputs(None, case.k, case.v, case.gates), segments)
    assert [len(x) for x in prepared] == [kept] * 2 * (kept > 0)
    assert sum(x.nbytes for x in prepared) <= delta.SCRATCH
    got, _ = by_recurrence(case, segments, module=Prepared(segments))
    for name, x in want.items():
        assert torch.equal(got[name], x), name


@each_kind
def test_systems_are_inverted_once_per_direction(kind, inverted):
    case = case_of(kind)
    want = by_reference(replace(case, **{n: getattr(case, n).cpu() for n in ("q", "k", "v", "state", "do", "dend")},
                                gates=tuple(g.cpu() for g in case.gates)).to(torch.float64), STARTS)  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in (*case.tokens, case.state)]
    q, k, v, *gates, state = leaves
    out, end = scan_recurrence(Module(), q, k, v, tuple(gates), Plan((Segment(0, 70, STARTS),)), state)
    slots = 2 * 2  # segments of 40 and 30 tokens, in chunks of 32
    assert inverted == [slots]
    torch.autograd.backward([out, end], [case.do, case.dend])
    assert inverted == [slots, slots]
    got = dict(zip(want, [out, end, *(x.grad for x in leaves)], strict=True))
    for name, x in want.items():
        assert relative(got[name].double().cpu(), x) < 1e-5 or got[name].norm() == x.norm() == 0, name


def test_a_scan_over_devices_passes_on_what_it_prepared(inverted):
    case = case_of("delta, scalar")

    def exchange(carries, state, reverse):
        return lambda: ([state], carries[0].carry_over(state))

    plan = Plan((Segment(0, 70, STARTS),), exchange)
    pending = begin_scan(Module(), case.k, case.v, case.gates, plan, case.state)
    assert inverted == [4]
    out, end = pending.finish(case.q)
    assert inverted == [4]
    want = scan_recurrence(Module(), case.q, case.k, case.v, case.gates, Plan(plan.pieces), case.state)
    assert torch.equal(out, want[0])
    assert torch.equal(end, want[1])


def test_the_operators_pass_on_what_is_prepared(inverted, monkeypatch):
    class Short:
        """The registered recurrence, in short segments."""

        def __getattr__(self, name):
            return getattr(DELTA, name)

        def segment_length(self, heads, length, device):
            return 40

    monkeypatch.setattr(operators.RegisteredRecurrence, "_module", lambda self, k: delta)
    case, plan = case_of("delta, scalar"), Plan((Segment(0, 70, STARTS),))
    results = []
    for recurrence in (Short(), Module()):
        leaves = [x.clone().requires_grad_() for x in (*case.tokens, case.state)]
        q, k, v, *gates, state = leaves
        out, end = scan_recurrence(recurrence, q, k, v, tuple(gates), plan, state)
        torch.autograd.backward([out, end], [case.do, case.dend])
        results.append([out, end, *(x.grad for x in leaves)])
    assert inverted == [4] * 4
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(CUDA, reason="NaN is contained on a CPU")
def test_what_is_prepared_of_a_token_that_is_nan_reaches_no_earlier_one(monkeypatch):
    monkeypatch.setattr(operators.RegisteredRecurrence, "_module", lambda self, k: delta)
    case, segments = case_of("delta, scalar"), Segment(0, 70, STARTS).cut(40)
    spoiled = replace(case, k=case.k.clone())
    spoiled.k[0, 50, 0, 1] = float("nan")  # of the document [33, 64), which lies in both segments
    outs = []
    for x in (case, spoiled):
        inputs = DELTA.prepare(Inputs(x.q, x.k, x.v, x.gates), segments)
        assert inputs.prepared
        outs.append(DELTA.apply(inputs, segments, torch.stack([x.state, x.state]))[0])
    untouched = [*range(50), *range(64, 70)]
    assert torch.equal(outs[1][:, untouched], outs[0][:, untouched])
    assert outs[1][0, 50:64].isnan().all()


def test_one_segment_and_vector_decays_keep_nothing(inverted):
    case = case_of("delta, scalar", 20)
    scan_recurrence(Module(), case.q, case.k, case.v, case.gates, Plan((Segment(0, 20),)), case.state)
    assert inverted == [1]
    case = case_of("delta, vector", 20)
    assert delta.prepare(Inputs(None, case.k, case.v, case.gates), [Segment(0, 20)]) == []


@pytest.mark.skipif(CUDA, reason="on a CPU")
def test_on_a_cpu_the_operators_prepare_nothing():
    case = draw("delta, scalar", 9)
    inputs = Inputs(None, case.k, case.v, case.gates)
    assert DELTA.prepare(inputs, [Segment(0, 9)]) is inputs
    case = draw("scalar", 9)
    inputs = Inputs(None, case.k, case.v, case.gates)
    assert case.recurrence.prepare(inputs, [Segment(0, 9)]) is inputs
    assert not hasattr(torch.ops.longctx, "additive_prepare")


def test_the_fake_operator_has_the_tensors_of_the_real_one(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(tuning, "_compute_capability", lambda device: 90)
    monkeypatch.setattr(operators.RegisteredRecurrence, "_module", lambda self, k: delta)
    segments = Segment(0, 300).cut(200)
    with FakeTensorMode():
        k = torch.empty(1, 300, 2, 128, dtype=torch.bfloat16)
        beta = torch.empty(1, 300, 2)
        inverse, factors = torch.ops.longctx.delta_prepare(None, k, k, [beta], operators._encode(segments))
    assert (inverse.shape, inverse.dtype) == ((2, 4, 1, 2, 64, 64), torch.bfloat16)
    assert (factors.shape, factors.dtype) == ((2, 4, 1, 2, 3, 64), torch.float32)

"""Linear attention on one device: the public function, one token at a time, the operators, and what is refused."""

import itertools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from longctx.kernels.linear.additive import ADDITIVE
from longctx.kernels.linear.api import Plan, linear_attention, scan_recurrence, step
from longctx.kernels.linear.delta import DELTA
from longctx.kernels.linear.feature_maps import ELEMENTWISE, NON_NEGATIVE, hedgehog
from longctx.kernels.linear.recurrence import Inputs, Segment
from tests.combinations import mostly_slow, mostly_slow_rows
from tests.kernels.linear.cases import GROUPS, KINDS, by_reference, draw, named_gates, relative

each_kind = pytest.mark.parametrize("kind", KINDS)


class Short:
    """A recurrence that wants short segments, as one for a device with many programs does."""

    def __init__(self, recurrence, size):
        self.recurrence, self.size = recurrence, size

    def __getattr__(self, name):
        return getattr(self.recurrence, name)

    def segment_length(self, heads, length, device):
        return self.size


@each_kind
@pytest.mark.parametrize("size", [None, 1, 23])
def test_gradients_of_everything_equal_autograd_through_the_reference(kind, size):
    case = draw(kind, 70, heads=GROUPS["fewer values"])
    want = by_reference(case, (30, 31))
    leaves = [x.clone().requires_grad_() for x in (*case.tokens, case.state)]
    q, k, v, *gates, state = leaves
    recurrence = Short(case.recurrence, size) if size else case.recurrence
    out, end = scan_recurrence(recurrence, q, k, v, tuple(gates), Plan((Segment(0, 70, (30, 31)),)), state)
    torch.autograd.backward([out, end], [case.do, case.dend])
    got = dict(zip(want, [out, end, *(x.grad for x in leaves)], strict=True))
    for name, x in want.items():
        assert relative(got[name], x) < 1e-11 or got[name].norm() == x.norm() == 0, name


class Logged:
    """A recurrence that writes down which of its functions is called."""

    def __init__(self, recurrence, calls):
        self.recurrence, self.calls = recurrence, calls

    def __getattr__(self, name):
        function = getattr(self.recurrence, name)

        def logged(*args):
            self.calls.append(name)
            return function(*args)

        return function if name in ("check", "prepare", "segment_length") else logged


def test_backward_the_gradients_of_queries_are_made_while_those_of_states_travel():
    case, calls = draw("constant", 20), []

    def exchange(carries, state, reverse):
        calls.append("sent")

        def wait():
            calls.append("waited")
            return [state], carries[0].carry_over(state)

        return wait

    q, k, v = (x.clone().requires_grad_() for x in case.tokens[:3])
    recurrence = Logged(case.recurrence, calls)
    out, _ = scan_recurrence(recurrence, q, k, v, case.gates, Plan((Segment(0, 20),), exchange), case.state)
    assert calls == ["summarize", "sent", "waited", "apply"]
    calls.clear()
    out.backward(case.do)
    assert calls == ["summarize_grad", "sent", "query_grad", "waited", "key_value_grad"]


@pytest.mark.parametrize(
    "kind", [kind if kind == "scalar" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize(
    "heads",
    [
        "gates alone",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("fewer values", "fewer queries and keys, as in Mamba-2")),
    ],
)
def test_the_triton_form_under_the_same_scan_gives_the_same(kind, heads):
    pytest.importorskip("triton", reason="pip install -e '.[triton]' to run the Triton kernels")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    from longctx.kernels.linear.additive import triton as triton_additive
    from longctx.kernels.linear.delta import triton as triton_delta

    case = draw(kind, 36, batch=1, heads=GROUPS[heads]).to(torch.float32)
    want = by_reference(case.to(torch.float64), (15, 16))
    leaves = [x.clone().requires_grad_() for x in (*case.tokens, case.state)]
    q, k, v, *gates, state = leaves
    recurrence = Short(triton_delta if case.recurrence is DELTA else triton_additive, 13)
    recurrence.check = case.recurrence.check
    recurrence.prepare = lambda inputs, segments: inputs
    out, end = scan_recurrence(recurrence, q, k, v, tuple(gates), Plan((Segment(0, 36, (15, 16)),)), state)
    torch.autograd.backward([out, end], [case.do, case.dend])
    got = dict(zip(want, [out, end, *(x.grad for x in leaves)], strict=True))
    for name, x in want.items():
        assert relative(got[name].double(), x) < 1e-5 or x.norm() < 1e-30, name


@each_kind
def test_packed_documents_are_as_they_would_be_alone(kind):
    case, bounds = draw(kind, 80), (0, 1, 33, 34, 80)
    out, end = linear_attention(
        case.q, case.k, case.v, **named_gates(case, case.gates), cu_seqlens=bounds, final_state=True
    )
    alone = []
    for begin, last in itertools.pairwise(bounds):
        part = case.cut(begin, last)
        gates = named_gates(case, part.gates)
        alone.append(linear_attention(part.q, part.k, part.v, **gates, final_state=True))
    torch.testing.assert_close(out, torch.cat([o for o, _ in alone], dim=1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(end, alone[-1][1], rtol=1e-11, atol=1e-12)


@each_kind
@pytest.mark.parametrize("cut", [1, 40, 63])
def test_the_final_state_of_a_prefix_continues_in_the_rest(kind, cut):
    case = draw(kind, 64)
    call = lambda c, **options: linear_attention(  # noqa: E731
        c.q, c.k, c.v, **named_gates(c, c.gates), **options, final_state=True
    )
    out, end = call(case)
    first, middle = call(case.cut(0, cut))
    rest, last = call(case.cut(cut, 64), initial_state=middle)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-11, atol=1e-12)
    # The same where the rest begins with the tail of the first document and holds others behind it.
    packed, _ = call(case.cut(cut, 64), cu_seqlens=(0, 64 - cut), continued=True, initial_state=middle)
    assert torch.equal(packed, rest)


@each_kind
@pytest.mark.parametrize("heads", GROUPS.values(), ids=GROUPS.keys())
def test_generating_token_by_token_is_the_same(kind, heads):
    case = draw(kind, 12, heads=heads)
    want, end = linear_attention(
        case.q, case.k, case.v, **named_gates(case, case.gates), initial_state=case.state, final_state=True
    )
    state, outs = case.state, []
    for t in range(12):
        gates = named_gates(case, [g if g.dim() == 1 else g[:, t] for g in case.gates])
        out, state = step(case.q[:, t], case.k[:, t], case.v[:, t], state, **gates)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, dim=1), want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-11, atol=1e-12)


@each_kind
def test_autocast_changes_nothing(kind):
    case = draw(kind, 70).to(torch.float32)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in case.tokens]
        q, k, v, *gates = leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, end = linear_attention(q, k, v, **named_gates(case, gates), final_state=True)
            torch.autograd.backward([out, end], [case.do, case.dend])
        results.append([out.detach(), end.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(got, want) for got, want in zip(*results, strict=True))


def test_a_sum_of_weights_beyond_float16_divides_all_the_same():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 4096, 1, 64, generator=generator).half() + 1 for _ in range(2))
    out, _ = linear_attention(q, k, torch.ones(1, 4096, 1, 4).half(), normalize=True)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-3, atol=0)


def test_a_shape_is_known_without_a_value():
    with FakeTensorMode():
        q, v = torch.empty(2, 9, 4, 5), torch.empty(2, 9, 4, 6)
        out, state = linear_attention(q, q, v, torch.empty(2, 9, 4), final_state=True)
    assert out.shape == (2, 9, 4, 6)
    assert state.shape == (2, 4, 5, 6)


@each_kind
def test_a_sequence_without_a_token_leaves_the_state_as_it_is(kind):
    case = draw(kind, 3).cut(0, 0)
    leaves = [x.clone().requires_grad_() for x in (*case.tokens, case.state)]
    q, k, v, *gates, state = leaves
    out, end = linear_attention(q, k, v, **named_gates(case, gates), initial_state=state, final_state=True)
    assert out.shape == (2, 0, 3, 7)
    assert torch.equal(end, case.state)
    torch.autograd.backward([out, end], [case.do, case.dend])
    assert torch.equal(state.grad, case.dend)
    assert all(x.grad is None or not x.grad.any() for x in leaves[:-1])


def test_normalized_outputs_are_weighted_means_of_the_values():
    case = draw("scalar", 30)
    q, k = case.q.exp(), case.k.exp()
    (g,) = case.gates
    weights = torch.einsum("bihk,bjhk->bhij", q, k) * 0.3
    sums = g.cumsum(dim=1).transpose(1, 2)
    weights = (weights * (sums[..., :, None] - sums[..., None, :]).exp()).tril()
    want = torch.einsum("bhij,bjhv->bihv", weights / (weights.sum(dim=-1, keepdim=True) + 1e-3), case.v)
    got, state = linear_attention(q, k, case.v, g, scale=0.3, normalize=True, eps=1e-3, final_state=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert state.shape == (2, 3, 5, 8)


def test_feature_maps_are_their_equations():
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = {
        "identity": x,
        "relu": x * (x > 0),
        "silu": x / (1 + (-x).exp()),
        "elu1": torch.where(x > 0, x + 1, x.exp()),
    }
    assert set(want) == set(ELEMENTWISE)
    for name, function in ELEMENTWISE.items():
        torch.testing.assert_close(function(x), want[name])
        assert (function(x) >= 0).all() == (name in NON_NEGATIVE)
    weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.stack([x[:, :, h] @ weight[h] for h in range(3)], dim=2) + 0.5
    exponentials = torch.cat([y.exp(), (-y).exp()], dim=-1)
    want_hedgehog = exponentials / exponentials.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(hedgehog(x, weight, torch.full((3, 4), 0.5, dtype=torch.float64)), want_hedgehog)


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "vector", "delta, vector"))
def test_the_compiler_takes_the_operators_whole(kind):
    case = draw(kind, 66).to(torch.float32)

    def loss(q, k, v, *gates):
        out, state = linear_attention(q, k, v, **named_gates(case, gates), cu_seqlens=(0, 20, 66), final_state=True)
        return (out * case.do).sum() + (state * case.dend).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in case.tokens]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("kind", "function"),
    mostly_slow_rows(
        itertools.product(
            KINDS, ["summarize", "apply", "summarize_grad", "apply_grad", "query_grad", "key_value_grad"]
        ),
        lambda kind, function: (
            kind == {"apply_grad": "constant", "apply": "delta, vector"}.get(function, "vector")
            or (kind, function) == ("delta, vector", "apply_grad")
        ),
    ),
)
def test_shapes_of_the_fake_operators_are_those_of_the_results(kind, function):
    case = draw(kind, 20, heads=GROUPS["fewer values"]).to(torch.bfloat16)
    gates, segments = list(case.gates), [0, 7, 1, 3, 7, 20, 0]
    states = torch.stack([case.state, case.state])
    arguments = {
        "summarize": (None, case.k, case.v, gates, segments),
        "apply": (case.q, case.k, case.v, gates, segments, states),
        "summarize_grad": (case.q, case.k, case.v, gates, segments, case.do),
        "apply_grad": (case.q, case.k, case.v, gates, segments, case.do, states, states, True),
        "query_grad": (case.q, case.k, case.v, gates, segments, case.do, states),
        "key_value_grad": (case.q, case.k, case.v, gates, segments, case.do, states),
    }[function]
    op = getattr(torch.ops.longctx, f"{case.recurrence.name}_{function}", None)
    if op is None:
        # The delta rule's dq has need of the writes that dk and dv are made of: all in one.
        assert (case.recurrence.name, function) in [("delta", "query_grad"), ("delta", "key_value_grad")]
        assert case.recurrence.query_grad(Inputs(*case.tokens[:3], case.gates), [], case.do, states) is None
        return
    torch.library.opcheck(op.default, arguments)


def test_flops_are_counted_as_the_recurrence_needs_them():
    q, k, v = torch.randn(2, 50, 6, 4), torch.randn(2, 50, 3, 4), torch.randn(2, 50, 3, 5).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out, _ = linear_attention(q, k, v)
    write_and_reads = 2 * 50 * 3 * (2 * 4 * 5) * (1 + 2)
    assert counter.get_total_flops() == write_and_reads
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * write_and_reads
    with FlopCounterMode(display=False) as counter:
        linear_attention(k, k, v, beta=torch.rand(2, 50, 3))
    assert counter.get_total_flops() == 2 * 50 * 3 * (2 * 4 * 5) * 3


def good():
    return {
        "q": torch.randn(2, 8, 4, 5),
        "k": torch.randn(2, 8, 4, 5),
        "v": torch.randn(2, 8, 4, 6),
        "log_decay": -torch.rand(2, 8, 4),
        "beta": torch.rand(2, 8, 4),
    }


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"q": torch.randn(8, 4, 5)}, "q has shape [8, 4, 5]: expected 4 dimensions, [batch, tokens, heads, head dim]"),
        ({"q": torch.ones(2, 8, 4, 5, dtype=torch.int64)}, "q is torch.int64: expected one of torch.float64"),
        ({"k": torch.randn(2, 8, 4, 5).double()}, "k is torch.float64, but q is torch.float32: expected the same"),
        ({"v": torch.randn(2, 8, 4, 6, device="meta")}, "v is on meta, but q is on cpu: expected the same device"),
        ({"k": torch.randn(2, 7, 4, 5)}, "k has batch and tokens [2, 7], but q has [2, 8]: expected the same"),
        ({"k": torch.randn(2, 8, 4, 3)}, "k has head dim 3, but q has 5: expected the same"),
        ({"v": torch.randn(2, 8, 4, 0)}, "v has shape [2, 8, 4, 0]: expected at least one head and one channel"),
        ({"v": torch.randn(2, 8, 3, 6)}, "v has 3 heads: expected a divisor of 4, the most of k, v, beta, log_decay"),
        ({"q": torch.randn(2, 8, 6, 5)}, "q has 6 heads: expected a divisor or a multiple of 4"),
        ({"log_decay": torch.zeros(2, 8)}, "log_decay has shape [2, 8]: expected [B, T, H] or [B, T, H, K]"),
        ({"log_decay": torch.zeros(2, 7, 4)}, "log_decay has shape [2, 7, 4]: expected [B, T, H] or [B, T, H, K] with"),
        ({"log_decay": torch.zeros(4)}, "log_decay has shape [4]: expected [B, T, H] or [B, T, H, K]"),
        ({"log_decay": torch.zeros(2, 8, 4, 3)}, "log_decay has 3 channels, but k has 5: expected the same"),
        ({"log_decay": torch.full((2, 8, 4), 0.5)}, "log_decay has the largest value 0.5: expected logarithms"),
        ({"log_decay": torch.zeros(2, 8, 4, dtype=torch.int64)}, "log_decay is torch.int64: expected a floating-point"),
        ({"log_decay": torch.zeros(2, 8, 0)}, "log_decay has shape [2, 8, 0]: expected at least one head"),
        ({"beta": torch.rand(2, 8, 4, 1)}, "beta has shape [2, 8, 4, 1]: expected [B, T, H]"),
        ({"beta": torch.rand(2, 8, 4, device="meta")}, "beta is on meta, but k is on cpu: expected the same device"),
        ({"cu_seqlens": (0, 5, 5, 8)}, "cu_seqlens has 5 after 5: expected strictly increasing values"),
        ({"cu_seqlens": (0, 6, 4, 8)}, "cu_seqlens has 4 after 6: expected strictly increasing values"),
        ({"cu_seqlens": (0, 9)}, "cu_seqlens ends with 9: expected the number of tokens, 8"),
        ({"cu_seqlens": (2, 8)}, "cu_seqlens begins [2, 8]: expected 0"),
        ({"cu_seqlens": (0, 2.5, 8)}, "cu_seqlens begins [0, 2.5, 8]: expected integers"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens begins [0.0, 8.0]: expected integers"),
        ({"initial_state": torch.zeros(2, 4, 5, 5)}, "initial_state has shape [2, 4, 5, 5]: expected [batch, heads, K"),
        ({"initial_state": torch.zeros(2, 4, 5, 6).half()}, "initial_state is torch.float16: expected torch.float32"),
        (
            {"initial_state": torch.zeros(2, 4, 5, 6), "cu_seqlens": (0, 8)},
            "initial_state is given, but the first document is not `continued`",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_argument_that_does_not_fit_is_named_with_its_value_and_what_was_expected(wrong, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        linear_attention(**good() | wrong)


def test_a_step_names_what_does_not_fit():
    q, v, state = torch.randn(2, 4, 5), torch.randn(2, 4, 6), torch.zeros(2, 4, 5, 6)
    with pytest.raises(ValueError, match=r"log_decay has the largest value 0\.5"):
        step(q, q, v, state, torch.full((2, 4), 0.5))
    with pytest.raises(ValueError, match=r"state has shape \[2, 4, 5, 7\]: expected"):
        step(q, q, v, torch.zeros(2, 4, 5, 7))
    with pytest.raises(ValueError, match="k has 3 heads: expected a divisor of 4"):
        step(q, q[:, :3], v, state)


def test_gates_that_a_recurrence_does_not_have_are_refused():
    arguments = good()
    q, k, v, g = (arguments[name] for name in ("q", "k", "v", "log_decay"))
    with pytest.raises(ValueError, match="the additive recurrence has 2 gates: expected log_decay"):
        scan_recurrence(ADDITIVE, q, k, v, (g, g), Plan((Segment(0, 8),)))

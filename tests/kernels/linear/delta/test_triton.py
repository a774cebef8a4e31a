"""The Triton kernels of the delta rule against the token-by-token reference in float64.

On a GPU they run there; elsewhere in Triton's interpreter, on CPU tensors (tests/conftest.py asks for it).
"""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from longctx.kernels.linear import tuning
from longctx.kernels.linear.delta import chunked as torch_delta
from longctx.kernels.linear.delta import triton as delta
from longctx.kernels.linear.delta import triton_vector
from longctx.kernels.linear.delta.triton_prepare import prepare_kernel
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.linear.triton_launch import LaunchPlan
from tests.combinations import mostly_slow
from tests.kernels.linear.cases import KINDS, by_recurrence, by_reference, draw, relative

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DELTA = [kind for kind in KINDS if kind.startswith("delta")]
ONE = (1, 1, 1, 1)
pytestmark = [pytest.mark.gpu] if CUDA else []
each_kind = pytest.mark.parametrize("kind", DELTA)
richest_kind = pytest.mark.parametrize(
    "kind", ["delta, vector", *(pytest.param(k, marks=pytest.mark.slow) for k in DELTA if k != "delta, vector")]
)
"""The kind that has all there is; the others, which have less, are slow tests."""


def moved(case, device):
    tensors = {name: getattr(case, name).to(device) for name in ("q", "k", "v", "state", "do", "dend")}
    return replace(case, gates=tuple(gate.to(device) for gate in case.gates), **tensors)


def on_device(case, dtype=torch.float32):
    return moved(case.to(dtype), DEVICE)


def check(case, segments, starts, bound=1e-5, dtype=torch.float32):
    """All functions, over segments that follow each other, against the reference of the whole."""
    low = on_device(case, dtype)
    got, again = by_recurrence(low, segments, module=delta)
    for name, want in by_reference(moved(low, "cpu").to(torch.float64), starts).items():
        wide = name in ("end", "dstate", "dbeta", "dlog_decay")
        assert got[name].dtype == (torch.float32 if wide else dtype), name
        assert got[name].shape == want.shape, name
        assert relative(got[name].double().cpu(), want) < bound or want.norm() == got[name].norm() == 0, name
    for name, (second, first) in again.items():
        assert relative(second, first) < bound or first.norm() < 1e-20, name


@pytest.mark.parametrize(
    ("kind", "starts"),
    [
        *(pytest.param(kind, (3, 31, 32, 36), id=f"inside-{kind}") for kind in DELTA),
        *(pytest.param(kind, (), id=f"no start-{kind}", marks=pytest.mark.slow) for kind in DELTA),
        *(pytest.param(kind, (0,), id=f"at 0-{kind}", marks=pytest.mark.slow) for kind in DELTA),
    ],
)
def test_all_passes_equal_the_reference(kind, starts):
    check(draw(kind, 40, batch=1, heads=ONE, key_dim=20, value_dim=12), [Segment(0, 40, starts)], starts)


@richest_kind
def test_segments_of_any_length_that_follow_each_other(kind):
    segments = [Segment(0, 1), Segment(1, 1), Segment(1, 36, (34,)), Segment(36, 40, (0, 1, 3))]
    check(draw(kind, 40, batch=1, heads=ONE), segments, (35, 36, 37, 39))


@richest_kind
def test_segments_in_any_order(kind):
    case = on_device(draw(kind, 40, batch=1, heads=ONE))
    segments = [Segment(22, 40, (5,)), Segment(0, 22)]
    states = torch.stack([case.state, 2 * case.state])
    dends = torch.stack([case.dend, -case.dend])
    forward = (case.q, case.k, case.v, case.gates)
    got = delta.apply(Inputs(*forward), segments, states)
    want = torch_delta.apply(Inputs(*forward), segments, states)
    *grads, dgates, dstates = delta.apply_grad(Inputs(*forward), segments, case.do, states, dends, True)
    *wanted, wanted_gates, wanted_states = torch_delta.apply_grad(
        Inputs(*forward), segments, case.do, states, dends, True
    )
    pairs = [*zip((*got, *grads, *dgates, dstates), (*want, *wanted, *wanted_gates, wanted_states), strict=True)]
    carries = [
        (
            made.summarize(Inputs(None, case.k, case.v, case.gates), segments),
            made.summarize_grad(Inputs(*forward), segments, case.do),
        )
        for made in (delta, torch_delta)
    ]
    for ours, theirs in zip(*carries, strict=True):
        pairs += [(ours.state, theirs.state), (ours.transition, theirs.transition)]
    for ours, theirs in pairs:
        # Little is left of a transition after so many tokens.
        assert (ours - theirs).norm() < 1e-5 * theirs.norm().clamp(min=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "length"), list(itertools.product(DELTA, [1, 2, 15, 16, 17, 31, 32, 33, 64, 70, 130]))
)
@pytest.mark.parametrize("starts", ["none", "at 0", "thirds", "every token"])
def test_lengths_and_starts(kind, length, starts):
    places = {
        "none": (),
        "at 0": (0,),
        "thirds": tuple(sorted({length // 3, 2 * length // 3})),
        "every token": tuple(range(length)),
    }[starts]
    check(draw(kind, length), [Segment(0, length, places)], places)


@richest_kind
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 33])
def test_one_document_per_token(kind, length):
    starts = tuple(range(length))
    check(draw(kind, length, batch=1, heads=ONE), [Segment(0, length, starts)], starts)


@pytest.mark.parametrize(
    "kind", ["delta, scalar", *(pytest.param(k, marks=pytest.mark.slow) for k in ("delta", "delta, vector"))]
)
@pytest.mark.parametrize(
    "heads",
    [
        # Together: more and fewer queries than states, and states that share keys, values and gates.
        *((6, 2, 2, 2), (1, 4, 4, 2)),
        *(
            pytest.param(heads, marks=pytest.mark.slow)
            for heads in ((4, 1, 2, 4), (3, 3, 3, 3), (6, 3, 3, 3), (4, 4, 2, 4), (2, 2, 6, 6))
        ),
    ],
    ids=str,
)
def test_grouped_heads(kind, heads):
    check(draw(kind, 10, batch=1, heads=heads), [Segment(0, 10, (7,))], (7,))


@richest_kind
def test_gates_with_fewer_heads_than_each_other(kind):
    case = draw(kind, 10, batch=1, heads=(4, 2, 4, 4))
    first, *others = case.gates
    case = replace(case, gates=(first[:, :, :2], *(gate[:, :, :1] for gate in others)))
    check(case, [Segment(0, 10)], ())


@richest_kind
@pytest.mark.parametrize("dims", mostly_slow([(1, 40), (33, 16), (65, 130)], (33, 16)), ids=str)
def test_head_dims(kind, dims):
    check(draw(kind, 19, batch=1, heads=ONE, key_dim=dims[0], value_dim=dims[1]), [Segment(0, 19, (4,))], (4,))


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("dims", [(16, 16), (128, 128), (256, 64), (200, 256)], ids=str)
def test_large_head_dims(kind, dims):
    case = draw(kind, 40, batch=1, heads=(2, 1, 1, 1), key_dim=dims[0], value_dim=dims[1])
    check(case, [Segment(0, 40, (9,))], (9,))


@richest_kind
@pytest.mark.parametrize("blocks", [pytest.param((16, 16, 16), marks=pytest.mark.slow), (64, 32, 16)], ids=str)
def test_tiles_of_any_size(kind, blocks, monkeypatch):
    chunk, block_k, block_v = blocks

    def sized(kernel, key_dim, *rest):
        walks = kernel.startswith(("delta_forward", "delta_backward"))
        whole = tuning.padded_dim(key_dim) if walks else block_k
        return {"chunk": chunk, "block_k": whole, "block_v": block_v, "warps": 4, "stages": 1}

    monkeypatch.setattr(tuning, "choose_tiles", sized)
    case = draw(kind, 40, batch=1, heads=(2, 1, 1, 1), key_dim=20, value_dim=24)
    check(case, [Segment(0, 40, (20,))], (20,))


@pytest.mark.parametrize(
    ("kind", "starts"),
    [
        *((kind, ()) for kind in DELTA[:2]),
        ("delta, vector", (10, 34)),
        *(pytest.param(kind, (10, 34), marks=pytest.mark.slow) for kind in DELTA[:2]),
        pytest.param("delta, vector", (), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decays_of_exp_minus_10000(kind, starts):
    case = draw(kind, 50, batch=1, heads=ONE, key_dim=16, value_dim=16, strong=True)
    check(case, [Segment(0, 50, starts)], starts)


@pytest.mark.parametrize("kind", mostly_slow(DELTA, "delta", "delta, vector"))
def test_keys_that_resemble_each_other(kind):
    case = draw(kind, 64, batch=1, heads=ONE, key_dim=16, value_dim=16)
    k = torch.nn.functional.normalize(case.k + 20 * case.k[:, :1], dim=-1)
    check(replace(case, k=k, gates=(0.5 * case.gates[0], *(0.01 * g for g in case.gates[1:]))), [Segment(0, 64)], ())


@pytest.mark.parametrize("kind", mostly_slow(DELTA, "delta, scalar", "delta, vector"))
def test_shares_of_0_and_2(kind):
    case = draw(kind, 40, batch=1, heads=ONE)
    beta = case.gates[0].clone()
    beta[:, ::3], beta[:, 1::3] = 0.0, 2.0
    check(replace(case, gates=(beta, *case.gates[1:])), [Segment(0, 40)], ())


@richest_kind
def test_without_gradients_of_gates_the_others_are_the_same(kind):
    case = on_device(draw(kind, 40, batch=1, heads=ONE))
    with_gates, _ = by_recurrence(case, [Segment(0, 40, (7,))], module=delta)
    without, _ = by_recurrence(case, [Segment(0, 40, (7,))], gate_grads=False, module=delta)
    for name, want in with_gates.items():
        if name in ("dbeta", "dlog_decay"):
            assert without[name] is None
        else:
            assert torch.equal(without[name], want), name


@pytest.mark.parametrize("kind", DELTA[1:])
def test_the_gradient_of_a_decay_that_acts_on_nothing_is_zero(kind):
    starts = (0, 17, 18, 32)
    case = on_device(draw(kind, 40, batch=1, heads=ONE))
    got, _ = by_recurrence(case, [Segment(0, 40, starts)], module=delta)
    assert not got["dlog_decay"][:, list(starts)].any()
    assert got["dlog_decay"][:, 1:17].abs().amin() > 0


@pytest.mark.parametrize(
    ("kind", "t"),
    [
        *((kind, 21) for kind in DELTA),
        *(("delta, vector", t) for t in (0, 32)),
        *(pytest.param(kind, t, marks=pytest.mark.slow) for kind in DELTA[:2] for t in (0, 32)),
    ],
)
def test_changing_a_token_leaves_earlier_outputs_bitwise_unchanged(kind, t):
    case = on_device(draw(kind, 40, batch=1, heads=ONE))
    segments, states = [Segment(0, 40)], case.state[None]
    before, _ = delta.apply(Inputs(case.q, case.k, case.v, case.gates), segments, states)
    for x in (case.q, case.k, case.v):
        x[:, t] = 100 * torch.rand_like(x[:, t])
    for gate in case.gates:
        gate[:, t] *= 1.5
    after, _ = delta.apply(Inputs(case.q, case.k, case.v, case.gates), segments, states)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@richest_kind
def test_strided_inputs_give_the_same_and_stay_as_they_are(kind):
    case = on_device(draw(kind, 12, heads=(2, 2, 2, 2)))
    want, _ = by_recurrence(case, [Segment(0, 12, (3,))], module=delta)
    # Heads before tokens; channels apart; a part of a wider tensor.
    strided = replace(
        case,
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        k=case.k.transpose(1, 3).contiguous().transpose(1, 3),
        v=torch.cat([case.v, case.v], dim=-1)[..., : case.v.shape[-1]],
        do=case.do.transpose(0, 1).contiguous().transpose(0, 1),
        gates=tuple(gate.transpose(1, 2).contiguous().transpose(1, 2) for gate in case.gates),
        state=case.state.transpose(-1, -2).contiguous().transpose(-1, -2),
        dend=case.dend.transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    tensors = [strided.q, strided.k, strided.v, strided.do, strided.state, strided.dend, *strided.gates]
    assert not any(x.is_contiguous() for x in tensors)
    copies = [x.clone() for x in tensors]
    got, _ = by_recurrence(strided, [Segment(0, 12, (3,))], module=delta)
    for name, x in want.items():
        assert torch.equal(got[name], x), name
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


@each_kind
def test_no_tokens(kind):
    case = on_device(draw(kind, 3).cut(0, 0))
    segments, states, dends = [Segment(0, 0)], case.state[None], case.dend[None]
    out, ends = delta.apply(Inputs(case.q, case.k, case.v, case.gates), segments, states)
    assert out.shape == case.do.shape
    assert torch.equal(ends, states)
    carry = delta.summarize(Inputs(None, case.k, case.v, case.gates), segments)
    assert torch.equal(carry.carry_over(states), states)
    back = delta.summarize_grad(Inputs(case.q, case.k, case.v, case.gates), segments, case.do)
    assert torch.equal(back.carry_over(dends), dends)
    *grads, dgates, dstates = delta.apply_grad(
        Inputs(case.q, case.k, case.v, case.gates), segments, case.do, states, dends, True
    )
    assert [x.shape for x in (*grads, *dgates)] == [x.shape for x in (case.q, case.k, case.v, *case.gates)]
    assert torch.equal(dstates, dends)


@richest_kind
def test_scratch_for_few_segments_at_a_time_gives_the_same(kind, monkeypatch):
    case = on_device(draw(kind, 20, batch=1, heads=ONE))
    segments = Segment(0, 20, (9,)).cut(12)
    want, _ = by_recurrence(case, segments, module=delta)
    counted = []
    launch = LaunchPlan.launch

    def counting(self, kernel, blocks, programs, *arguments, **constants):
        counted.append((kernel in (prepare_kernel, triton_vector.prepare_kernel), programs))
        launch(self, kernel, blocks, programs, *arguments, **constants)

    monkeypatch.setattr(LaunchPlan, "launch", counting)
    monkeypatch.setattr(delta, "SCRATCH", 1)
    got, _ = by_recurrence(case, segments, module=delta)
    for name, x in want.items():
        assert torch.equal(got[name], x), name
    assert [programs for prepares, programs in counted if prepares] == [1] * 4 * len(segments)


@each_kind
def test_half_precision_does_not_overflow(kind):
    case = draw(kind, 40, batch=1, heads=ONE)
    low = on_device(replace(case, q=case.q * 60, v=case.v * 3000), torch.float16)
    segments, states = [Segment(0, 40)], low.state[None]
    state = delta.summarize(Inputs(None, low.k, low.v, low.gates), segments).carry_over(states)
    assert state.dtype == torch.float32
    want = by_reference(moved(low, "cpu").to(torch.float64), ())["end"]
    assert relative(state[0].double().cpu(), want) < 1e-3
    out, _ = delta.apply(Inputs(low.q, low.k, low.v / 1000, low.gates), segments, states)
    assert out.dtype == torch.float16
    assert out.isfinite().all()


@pytest.mark.skipif(not CUDA, reason="the interpreter multiplies bf16 wrongly")
@each_kind
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 128)], ids=str)
def test_bfloat16(kind, dims):
    case = draw(kind, 600, heads=(2, 2, 2, 2), key_dim=dims[0], value_dim=dims[1]).to(torch.bfloat16)
    starts = (100, 400)
    check(case, Segment(0, 600, starts).cut(256), starts, bound=3e-2, dtype=torch.bfloat16)


def test_what_the_kernels_do_not_take_is_refused():
    case = draw("delta", 4)
    with pytest.raises(ValueError, match=r"float64.*kernels\.linear\.delta"):
        delta.summarize(Inputs(None, case.k, case.v, case.gates), [Segment(0, 4)])
    wide = torch.zeros(1, 4, 2, tuning.MAX_HEAD_DIM + 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"{tuning.MAX_HEAD_DIM + 1}"):
        delta.summarize(Inputs(None, wide, wide, (wide[..., 0],)), [Segment(0, 4)])

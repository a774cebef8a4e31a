"""Float32 over a million tokens, against float64: the error does not grow with the sequence, however slow the decay."""

from types import SimpleNamespace

import pytest
import torch

from longctx.kernels.linear import linear_attention
from longctx.kernels.linear.chunking import ChunkLoop, split_chunks
from longctx.kernels.linear.recurrence import Inputs, Segment
from longctx.kernels.linear.running_state import CHUNKS_PER_BASE, RunningState, backward_chunks
from tests.kernels.linear.cases import KINDS, draw, named_gates

DECAYS = torch.tensor([1e-9, 3.9e-8, 1e-6, 1e-4, 1e-2, 1.0])
"""One per head, the same at every token: every chunk rounds alike. The recipe `million` has 3.9e-8."""
BOUND = 4e-6


def inputs_of(kind, length, dim):
    """Tokens and gates in float32, the same decays at every token."""
    heads = len(DECAYS)
    case = draw(kind, length, batch=1, heads=(heads,) * 4, key_dim=dim, value_dim=dim).to(torch.float32)
    gates = named_gates(case, case.gates)
    if "log_decay" in gates:
        along = {1: (heads,), 3: (1, 1, heads), 4: (1, 1, heads, 1)}[gates["log_decay"].dim()]
        gates["log_decay"] = -DECAYS.view(along).expand_as(gates["log_decay"])
    return {"q": case.q, "k": case.k, "v": case.v, **gates}, case.do


def passes(inputs, do, dtype):
    """o and all gradients."""
    leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    out, _ = linear_attention(**leaves)
    out.backward(do.to(dtype))
    return {"o": out.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def largest(x, at):
    """The largest number per head among tokens `at` of `[B, T, H, ...]`; those of `[H]` as they are."""
    return x.abs() if x.dim() == 1 else x[:, at].abs().transpose(0, 2).flatten(1).amax(dim=1)


def errors(kind, length, dim=8):
    """Relative errors by head where they have added up: at the sequence's end, for dk, dv and gates at its start."""
    inputs, do = inputs_of(kind, length, dim)
    got, want = passes(inputs, do, torch.float32), passes(inputs, do, torch.float64)
    edges = {name: slice(-4096, None) if name in ("o", "dq") else slice(0, 4096) for name in got}
    found = {name: largest(got[name] - want[name], at) / largest(want[name], at) for name, at in edges.items()}
    if kind == "constant":
        # A sum over tokens that cancels: relative to its terms.
        inputs["log_decay"] = inputs["log_decay"].expand(1, length, -1)
        terms = passes(inputs, do, torch.float64)["dlog_decay"].abs().sum(dim=(0, 1))
        found["dlog_decay"] = (got["dlog_decay"] - want["dlog_decay"]).abs() / terms
    return found


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("constant", 2**15),  # enough: without new bases the error is twice the bound
        pytest.param("constant", 2**17, marks=pytest.mark.slow),
        *(pytest.param(kind, 2**20, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_float32_is_as_accurate_at_the_end_of_a_sequence_as_at_its_start(kind, length):
    for name, error in errors(kind, length).items():
        assert error.max() < BOUND, f"{name}: {error.tolist()}"


@pytest.mark.parametrize("length", [2**16, pytest.param(2**20, marks=pytest.mark.slow)])
def test_what_the_first_tokens_wrote_decays_as_it_should_though_nothing_is_written_after_them(length):
    inputs, _ = inputs_of("constant", length, 8)
    inputs["k"][:, 64:] = 0
    out, _ = linear_attention(**inputs)
    want, _ = linear_attention(**{name: x.double() for name, x in inputs.items()})
    end = slice(-64, None)
    kept = DECAYS < 1e-4  # of the others next to nothing is left
    error = (largest(out - want, end) / largest(want, end))[kept]
    assert error.max() < BOUND, error.tolist()


def loop_of(dtype=torch.float64):
    return ChunkLoop(Inputs(None, torch.zeros(1, 6, 1, 3, dtype=dtype), torch.zeros(1, 6, 1, 2, dtype=dtype), ()), 8)


def decay_of(keeps, starts=()):
    keeps = torch.full((1, 1, 1), keeps, dtype=torch.float64)
    return SimpleNamespace(keeps=keeps, masks=SimpleNamespace(starts=starts))


@pytest.mark.parametrize("count", [1, CHUNKS_PER_BASE, CHUNKS_PER_BASE + 1, 3 * CHUNKS_PER_BASE + 2])
def test_a_state_is_decayed_and_added_to_over_any_number_of_chunks(count):
    state = RunningState(loop_of(), "state", torch.ones(1, 3, 2, dtype=torch.float64))
    want = 1.0
    for chunk in range(count):
        state.decay(decay_of(0.9)).add_(chunk)
        want = 0.9 * want + chunk
        torch.testing.assert_close(state.value(), torch.full_like(state.value(), want), rtol=1e-14, atol=0)
    state.decay(decay_of(0.0, starts=(0,))).add_(7)
    assert (state.value() == 7).all()


def test_a_document_start_drops_a_state_that_is_not_finite():
    state = RunningState(loop_of(), "state", torch.full((1, 3, 2), torch.inf, dtype=torch.float64))
    state.decay(decay_of(0.5)).fill_(torch.nan)
    state.decay(decay_of(0.0, starts=(3,))).add_(2)
    assert (state.value() == 2).all()


@pytest.mark.parametrize("chunks_per_checkpoint", [1, 2, 3, 100])
def test_backward_visits_chunks_from_last_to_first_with_the_state_before_each(chunks_per_checkpoint):
    """A chunk that begins at b maps a state S to 2 S + b, and the gradient dS to 2 dS."""
    loop = loop_of()
    segments = [split_chunks(s, 2, pad_to_power_of_two=False) for s in (Segment(0, 5), Segment(5, 6), Segment(6, 6))]
    states = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(3, 1, 1, 1, 1).repeat(1, 1, 1, 3, 2)
    visited = []

    def advance(group, chunk, state):
        state.decay(decay_of(2.0)).add_(chunk.begin)

    def chunk_grad(group, chunk, state, dstate):
        visited.append((chunk.begin, state.unique().tolist()))
        dstate.decay(decay_of(2.0))

    dstates = backward_chunks(loop, segments, states, states + 1, advance, chunk_grad, chunks_per_checkpoint)
    assert visited == [(4, [6.0]), (2, [2.0]), (0, [1.0]), (5, [10.0])]
    assert [d.unique().tolist() for d in dstates] == [[16.0], [22.0], [101.0]]

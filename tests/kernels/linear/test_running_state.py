"""Float32 over a million tokens, against float64: the error does not grow with the sequence, however slow the decay."""

import pytest
import torch

from longctx.kernels.linear import linear_attention
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
        ("constant", 2**17),
        ("delta, scalar", 2**15),
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

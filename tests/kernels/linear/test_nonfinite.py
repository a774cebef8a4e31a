"""NaN and infinity in the inputs of a recurrence: earlier tokens and other documents do not change by a bit."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from longctx.kernels.linear.operators import RegisteredRecurrence
from longctx.kernels.linear.recurrence import Segment
from tests.combinations import mostly_slow_rows
from tests.kernels.linear.cases import KINDS, by_recurrence, by_reference, draw

LENGTH, STARTS = 150, (20, 70, 75, 128)
BOUNDS = (0, *STARTS, LENGTH)
TOKENS = (0, 19, 40, 72, 130, 149)
GRADIENTS = ("dq", "dk", "dv", "dbeta", "dlog_decay")


def spoiled(case, name, t, value):
    """A case with one number of one head of a tensor replaced."""
    names = ["beta", "log_decay"] if name in ("beta", "log_decay") and len(case.gates) == 2 else [name]
    if name in ("q", "k", "v", "do"):
        x = getattr(case, name).clone()
        x[0, t, 1, -1:] = value
        return replace(case, **{name: x})
    gates = [gate.clone() for gate in case.gates]
    gates[names.index(name)][0, t, 1] = value
    return replace(case, gates=tuple(gates))


def tensors_of(kind):
    recurrence, decay = KINDS[kind]
    gates = (["beta"] if recurrence.name == "delta" else []) + (["log_decay"] if decay in ("scalar", "vector") else [])
    return ["q", "k", "v", "do", *gates]


def document(t):
    begin = max(bound for bound in BOUNDS if bound <= t)
    return begin, BOUNDS[BOUNDS.index(begin) + 1]


def rows(x):
    """Which rows of the first sequence's second head are finite, `[T]`."""
    return torch.isfinite(x[0, :, 1]).flatten(1).all(dim=1) if x.dim() > 3 else torch.isfinite(x[0, :, 1])


USUAL = ("scalar", "delta, vector")
"""Kinds with all their tensors; of the others, v."""
CASES = [(kind, name) for kind in KINDS for name in tensors_of(kind)]


def check_contained(case, name, value, tokens):
    """A number of `name` that is not finite reaches no earlier token and no other document."""
    segments = Segment(0, LENGTH, STARTS).cut(60)
    before, _ = by_recurrence(case, segments)
    for t in tokens:
        begin, end = document(t)
        after, _ = by_recurrence(spoiled(case, name, t, value), segments)
        for other in ("o", *GRADIENTS):
            if other not in before or before[other].dim() == 1:
                continue
            first = t if other == "o" else begin
            unchanged = torch.ones(before[other].shape[:3], dtype=torch.bool)
            unchanged[0, first:end, 1] = False
            assert torch.equal(before[other][unchanged], after[other][unchanged]), (other, t)
        # Nor does it vanish: the token's own output, and with k, v and gates all later ones of the document.
        lasting = slice(t, t + 1 if name == "q" else end)
        assert name == "do" or not rows(after["o"])[lasting].any()
        assert name != "do" or (torch.equal(before["o"], after["o"]) and not rows(after["dq"])[t])


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "name"), mostly_slow_rows(CASES, lambda kind, name: kind in USUAL or name == "v"))
def test_what_is_not_finite_stays_in_its_document_and_after_its_token(kind, name, value):
    check_contained(draw(kind, LENGTH).to(torch.float32), name, value, TOKENS)


@pytest.mark.parametrize(
    ("kind", "name"),
    mostly_slow_rows(CASES, lambda kind, name: (kind, name) in (("vector", "v"), ("delta, scalar", "k"))),
)
def test_tritons_kernels_are_contained_where_they_are_checked(kind, name, monkeypatch):
    pytest.importorskip("triton")
    module = import_module(f"longctx.kernels.linear.{KINDS[kind][0].name}.triton")
    monkeypatch.setattr(RegisteredRecurrence, "_module", lambda recurrence, k: module)
    case = draw(kind, LENGTH, batch=1, heads=(2, 2, 2, 2)).to(torch.float32)
    check_contained(case, name, float("nan"), [40])


@pytest.mark.parametrize(("kind", "name"), mostly_slow_rows(CASES, lambda kind, name: kind in USUAL or name == "v"))
def test_rows_that_are_not_finite_are_those_of_the_equations(kind, name):
    case, segments = draw(kind, LENGTH), [Segment(0, LENGTH, STARTS)]
    case = spoiled(case, name, 40, float("nan"))
    got, _ = by_recurrence(case, segments)
    want = by_reference(case, STARTS)
    assert torch.equal(rows(got["o"]), rows(want["o"]))
    for other in GRADIENTS:
        if other in got and got[other].dim() > 1:
            # Where the equations give NaN, and at most elsewhere in the document.
            assert not (rows(got[other]) & ~rows(want[other])).any(), other


def test_a_state_that_is_not_finite_ends_with_its_document():
    case, segments = draw("scalar", LENGTH), [Segment(0, 60, (30,)), Segment(60, LENGTH)]
    want, _ = by_recurrence(case, segments)
    state = case.state.clone()
    state[0, 1, 2, 3] = float("nan")
    got, _ = by_recurrence(replace(case, state=state), segments)
    assert not rows(got["o"])[:30].any()
    assert torch.equal(got["o"][:, 30:], want["o"][:, 30:])
    assert torch.equal(got["end"], want["end"])


def test_a_decay_of_minus_infinity_is_a_decay():
    case = draw("scalar", LENGTH).to(torch.float32)
    case = spoiled(spoiled(case, "log_decay", 40, float("-inf")), "q", 100, float("nan"))
    got, _ = by_recurrence(case, [Segment(0, LENGTH)])
    finite = rows(got["o"])
    assert not finite[100]
    assert finite.sum() == LENGTH - 1

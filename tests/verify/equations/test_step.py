"""Faults that all ranks have alike, which no comparison of ranks shows: `verify` finds them by the equations."""

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest

from longctx.engines import step
from longctx.layers import basic, rotary
from longctx.mixers import lightning
from longctx.model import decoder
from longctx.moe import expert_router
from longctx.parallel.layout import Layout
from longctx.recipe.tables import TrainConfig
from longctx.verify import run
from longctx.verify.cases import Case
from longctx.verify.equations.step import Equations, evaluate
from longctx.verify.measure import Subject, measure
from longctx.verify.run import verify
from tests.combinations import mostly_slow
from tests.model.cases import VOCABULARY, hybrid, with_experts

SUBJECT = Subject(hybrid(), TrainConfig(steps=1), VOCABULARY, length=32, seed=1)
L, S = "blocks.0.mixer.qkvu.weight", "blocks.1.mixer.qkv.weight"


def doubled_positions(patch):
    right = rotary.rotary_table
    patch.setattr(rotary, "rotary_table", lambda positions, *rest: right(2 * positions, *rest))


def another_decay(patch):
    right = lightning.log_decays
    patch.setattr(lightning, "log_decays", lambda *arguments: [1.001 * decay for decay in right(*arguments)])


def another_residual(patch):
    patch.setattr(decoder, "_add_residual", lambda stream, out, factors: stream + 1.001 * out)


def another_epsilon(patch):
    right = basic.rms_norm
    patch.setattr(basic, "rms_norm", lambda x, weight, eps: right(x, weight, 1.1 * eps))


def another_gradient(patch):
    right = decoder.linear_cross_entropy

    def wrong(*arguments):
        total, nll = right(*arguments)
        return total + 0.001 * (total - total.detach()), nll

    patch.setattr(decoder, "linear_cross_entropy", wrong)


def a_mean_over_tokens(patch):
    patch.setattr(step, "loss_scale", lambda batches, device: 1 / (2 * 32))


def another_balance(patch):
    right = expert_router.load_balancing_loss
    patch.setattr(expert_router, "load_balancing_loss", lambda *arguments: 1.001 * right(*arguments))


def a_state_that_crosses_a_document_start(patch):
    right = Layout.starts

    def wrong(layout, part):
        ignored = layout.cu_seqlens[len(layout.cu_seqlens) // 2]
        return tuple(at for at in right(layout, part) if part.begin + at != ignored)

    patch.setattr(Layout, "starts", wrong)


def two_documents_taken_for_one(patch):
    right = Layout.on.__func__

    def wrong(cls, mesh, bounds, *arguments, **options):
        middle = len(bounds) // 2
        joined = bounds[:middle] + bounds[middle + 1 :] if len(bounds) > 2 else bounds
        return right(cls, mesh, joined, *arguments, **options)

    patch.setattr(Layout, "on", classmethod(wrong))


FAULTS = {
    doubled_positions: {"loss", "logits", S},
    another_decay: {"loss", "logits", L},
    another_residual: {"loss", "logits", L, S},
    another_epsilon: {"loss", "logits", L, S, "norm.weight"},
    another_gradient: {L, S, "norm.weight", "embedding.weight"},
    a_mean_over_tokens: {"loss", L, S, "embedding.weight"},
    another_balance: {"blocks.1.ffn.router.weight"},
    a_state_that_crosses_a_document_start: {"loss", "logits", L},
    two_documents_taken_for_one: {"loss", "logits", S},
}
"""Faults, and some of the tensors that each makes wrong."""
PACKED = (a_state_that_crosses_a_document_start, two_documents_taken_for_one)
RIGHT = {another_gradient: {"loss", "logits"}, a_mean_over_tokens: {"logits"}, another_balance: {"loss", "logits"}}
"""Tensors that stay right."""


def everywhere(fault, function, *arguments):
    """Run a function on a rank that has the fault, as all others do."""
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        return function(*arguments)


@pytest.mark.parametrize(
    "fault",
    mostly_slow(FAULTS, doubled_positions, another_decay, another_balance, a_state_that_crosses_a_document_start),
)
def test_a_fault_that_all_ranks_have_is_found_by_the_equations_alone(ranks, monkeypatch, fault):
    monkeypatch.setattr(run, "cases", lambda most_ranks, model: iter([Case(2, "zigzag", True)]))
    subject = replace(SUBJECT, model=with_experts()) if fault is another_balance else SUBJECT
    functions = {"measure": partial(everywhere, fault, measure), "evaluate": partial(everywhere, fault, evaluate)}
    document, packed, over_ranks = islice(verify(subject, ranks, **functions), 3)
    assert set(packed.failures) >= FAULTS[fault]
    assert not set(packed.failures) & RIGHT.get(fault, set())
    assert (document.failures == []) if fault in PACKED else FAULTS[fault] <= set(document.failures)
    assert over_ranks.failures == []


def test_long_sequences_are_cut_and_the_row_says_so(ranks, monkeypatch):
    monkeypatch.setattr(run, "cases", lambda most_ranks, model: iter(()))
    monkeypatch.setattr(run, "EQUATIONS_LENGTH", 16)
    rows = list(islice(verify(SUBJECT, ranks), 2))
    assert [str(row.case) for row in rows] == [
        "the equations on 16 tokens, one document",
        "the equations on 16 tokens, packed",
    ]
    assert [row.failures for row in rows] == [[], []]


def test_all_sequences_are_in_the_loss_and_the_gradients_and_labels_are_counted():
    found = evaluate(SUBJECT, packed=True)
    assert found["logits"].shape == (2, 32, VOCABULARY)
    assert found.keys() == {"loss", "logits", *(name for name in found if "." in name)}
    nothing = evaluate(replace(SUBJECT, length=1), packed=False)
    assert float(nothing["loss"]) == 0
    assert not nothing["embedding.weight"].any()
    assert str(Equations(packed=True)) == "the equations, packed"

"""Verification to the bit: a sound step has no difference, and the smallest fault on one process has one."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from longctx.engines import reproducible, torch_engine
from longctx.kernels.loss import IGNORE
from longctx.parallel.layout import Layout
from longctx.recipe.tables import TrainConfig
from longctx.verify import bits
from longctx.verify.bits import Shared, difference, step_of, verify_bits
from longctx.verify.measure import Subject
from tests.combinations import mostly_slow
from tests.model.cases import VOCABULARY, hybrid

SUBJECT = Subject(hybrid(), TrainConfig(steps=1, precision="bf16", clip=0.05), VOCABULARY, length=32, seed=1)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_sound_step_is_equal_to_the_bit(ranks, precision):
    rows = list(verify_bits(replace(SUBJECT, train=TrainConfig(steps=1, precision=precision, clip=0.05)), ranks))
    assert [str(row.case) for row in rows] == [
        f"4 virtual ranks on {processes} processes, {packed}"
        for packed in ("one document", "packed")
        for processes in (2, 4)
    ]
    for row in rows:
        assert row.precision == precision
        assert set(row.differences.values()) == {0.0}
        assert row.failures == []
        assert {"loss", "grad norm", "embedding.weight", "moment of embedding.weight"} < row.differences.keys()


def shifted_positions(patch):
    right = Layout.positions.func
    patch.setattr(Layout, "positions", property(lambda layout: right(layout) + 1))


def no_document_starts(patch):
    patch.setattr(Layout, "starts", lambda layout, part: ())


def scaled_gradient(patch):
    right = reproducible._compute

    def wrong(task):
        leaf, stats = right(task)
        leaf.gradients[:40] *= 1.001
        return leaf, stats

    patch.setattr(reproducible, "_compute", wrong)


def skipped_label(patch):
    right = bits.batch_of

    def wrong(*arguments):
        batch = right(*arguments)
        labels = batch.virtual[0].labels
        labels[0, (labels[0] != IGNORE).nonzero()[:1, 0]] = IGNORE
        return batch

    patch.setattr(bits, "batch_of", wrong)


def no_clipping(patch):
    patch.setattr(torch_engine, "clip_grads_with_norm_", lambda *arguments: None)


def another_sequence(patch):
    right = bits.batch_of
    patch.setattr(bits, "batch_of", lambda subject, case, number, mesh: right(subject, case, 1 - number, mesh))


FAULTS = [shifted_positions, no_document_starts, scaled_gradient, skipped_label, no_clipping, another_sequence]


def faulty(fault, subject, shared):
    """A step with a fault on the second of the processes."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            fault(patch)
        return step_of(subject, shared)


@pytest.mark.parametrize("fault", mostly_slow(FAULTS, shifted_positions, scaled_gradient, skipped_label))
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_fault_on_one_process_is_found(ranks, fault, precision):
    subject = replace(SUBJECT, train=TrainConfig(steps=1, precision=precision, clip=0.05))
    packed = fault is not another_sequence  # one with other documents would not even run
    (want,) = ranks.run(step_of, subject, Shared(4, 1, packed), size=1)
    each = ranks.run(faulty, fault, subject, Shared(4, 4, packed), size=4)
    wrong = {name for name, ref in want.items() for found in each if difference(found[name], ref) > 0}
    assert wrong & {"embedding.weight", "moment of embedding.weight"}, wrong


def test_fewer_than_two_ranks_have_no_rows(ranks):
    class One:
        size = 1

    assert list(verify_bits(SUBJECT, One())) == []


def test_a_difference_of_one_bit_is_above_zero():
    x = torch.tensor([1.0, 2.0])
    assert difference(x, x.clone()) == 0
    assert 0 < difference(x, torch.nextafter(x, torch.tensor(3.0))) < 1e-6
    assert difference(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    assert difference(torch.tensor([5e-324], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)) > 0

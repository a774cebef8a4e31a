"""Which checkpoints stay: the latest, milestones, and the one with the lowest comparable held-out loss."""

import math

import pytest

from longctx.checkpoint.retention import HeldOut, RetentionPolicy

STEPS = (10, 20, 30, 40, 50, 60)


def heldout(**losses: float) -> dict[int, HeldOut]:
    """Losses over 8 sequences, by step: `_10=2.5`."""
    return {int(step[1:]): HeldOut(loss, 8) for step, loss in losses.items()}


def kept(retention: RetentionPolicy, losses: dict[int, HeldOut] | None = None) -> list[int]:
    surplus = retention.surplus(STEPS, losses or {})
    assert surplus == sorted(surplus)
    return [step for step in STEPS if step not in surplus]


@pytest.mark.parametrize("keep", [1, 2, 6, 7])
def test_the_latest_are_kept(keep):
    assert kept(RetentionPolicy(keep)) == list(STEPS[-keep:])


def test_milestones_are_kept_besides():
    assert kept(RetentionPolicy(1, every=20)) == [20, 40, 60]
    assert kept(RetentionPolicy(2, every=30)) == [30, 50, 60]


def test_the_best_is_kept_besides():
    losses = heldout(_10=3.0, _20=2.0, _40=2.5, _60=2.4)
    assert kept(RetentionPolicy(1, sequences=8), losses) == [20, 60]
    assert kept(RetentionPolicy(1, every=30, sequences=8), losses) == [20, 30, 60]


def test_a_best_among_the_latest_keeps_no_other():
    assert kept(RetentionPolicy(2, sequences=8), heldout(_10=3.0, _60=2.0)) == [50, 60]


def test_of_two_equally_good_ones_the_later_is_the_best():
    assert RetentionPolicy(1, sequences=8).best(heldout(_10=2.0, _20=2.0, _30=2.1)) == 20


def test_a_loss_over_other_sequences_is_not_compared():
    losses = heldout(_20=2.0) | {10: HeldOut(1.0, 16)}
    assert RetentionPolicy(1, sequences=8).best(losses) == 20
    assert RetentionPolicy(1, sequences=16).best(losses) == 10
    assert RetentionPolicy(1, sequences=4).best(losses) is None


def test_a_loss_of_another_stage_is_not_compared():
    losses = {10: HeldOut(1.0, 8, "short"), 20: HeldOut(2.0, 8, "long"), 30: HeldOut(1.5, 8)}
    assert RetentionPolicy(1, sequences=8, stage="long").best(losses) == 20
    assert RetentionPolicy(1, sequences=8, stage="short").best(losses) == 10
    assert RetentionPolicy(1, sequences=8).best(losses) == 30


def test_the_last_checkpoint_of_each_stage_is_kept():
    assert kept(RetentionPolicy(2, stage_ends=frozenset({10, 30})), {}) == [10, 30, 50, 60]


def test_no_best_without_a_loss_or_where_none_is_asked_for():
    assert RetentionPolicy(1, sequences=8).best({}) is None
    assert RetentionPolicy(1).best(heldout(_20=2.0)) is None
    assert kept(RetentionPolicy(1), heldout(_20=2.0)) == [60]


@pytest.mark.parametrize("stored", [{"loss": math.nan, "sequences": 8}, {"loss": "2", "sequences": 8}, {"loss": 2.0}])
def test_a_stored_loss_that_is_none_is_refused(stored):
    with pytest.raises((ValueError, KeyError)):
        HeldOut.parse(stored)
    assert HeldOut.parse({"loss": 2, "sequences": 8}) == HeldOut(2.0, 8)
    assert HeldOut.parse({"loss": 2, "sequences": 8, "stage": "4ki"}) == HeldOut(2.0, 8, "4ki")

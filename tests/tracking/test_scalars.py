"""The table of names: what each record is called in a tracker."""

from dataclasses import replace

from longctx.tracking.scalars import scalars
from tests.tracking.records import evaluation, spike, step


def test_the_scalars_of_a_step() -> None:
    assert scalars(step(2)) == {
        "train/loss": 2.5,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5,
        "train/tokens": 2048,
        "speed/tokens_per_second": 1e4,
        "speed/utilisation": 0.4,
        "speed/step_seconds": 0.1,
        "memory/peak_gib": 1.0,
        "waits/median": 0.5,
        "waits/least": 0.25,
        "waits/rank": 3,
        "routing_imbalance/blocks.3.ffn": 1.5,
        "routing_entropy/blocks.3.ffn": 0.7,
        "routing_dropped/blocks.3.ffn": 0.0,
    }


def test_a_step_without_routers_and_waits_has_none_of_theirs() -> None:
    assert len(scalars(replace(step(2), routers={}, waits=None))) == 8


def test_an_empty_position_bucket_has_no_scalar() -> None:
    assert scalars(evaluation(4)) == {
        "heldout/loss": 2.6,
        "heldout_by_position/00000000": 4.0,
        "heldout_by_position/00000002": 3.0,
        "routing_fluctuation/blocks.3.ffn": 0.25,
    }


def test_a_spike_is_its_loss() -> None:
    assert scalars(spike(4)) == {"train/spike": 9.0}

"""The learning rate's factor: its values at the edges, and no jump or bump between them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from longctx.recipe.tables import LRScheduleConfig
from longctx.train.lr_schedule import lr_factor


@st.composite
def schedules(draw):
    """A schedule and a number of steps that it fits."""
    kind = draw(st.sampled_from(["cosine", "wsd", "constant"]))
    steps = draw(st.integers(1, 60))
    decay = draw(st.integers(1, steps)) if kind == "wsd" else None
    warmup = draw(st.integers(0, steps - (decay or 0)))
    falls = {} if kind == "constant" else {"final": draw(st.floats(0, 1))}
    return LRScheduleConfig(kind=kind, warmup=warmup, decay=decay, **falls), steps


@given(schedules())
def test_it_rises_by_equal_parts_and_never_rises_again(schedule):
    config, steps = schedule
    values = [lr_factor(config, step, steps) for step in range(1, steps + 1)]
    assert values[: config.warmup] == pytest.approx([n / config.warmup for n in range(1, config.warmup + 1)])
    peak = max(config.warmup - 1, 0)
    assert all(left >= right - 1e-12 for left, right in zip(values[peak:], values[peak + 1 :], strict=False))
    lowest = min([1.0 if config.kind == "constant" else config.final, *values[: config.warmup]])
    assert all(lowest - 1e-12 <= value <= 1 for value in values)


@given(schedules())
def test_the_last_step_has_the_final_factor(schedule):
    config, steps = schedule
    falls = config.kind != "constant" and config.warmup < steps
    assert lr_factor(config, steps, steps) == pytest.approx(config.final if falls else 1.0, abs=1e-12)


@given(schedules())
def test_wsd_is_constant_until_its_decay_and_then_falls_by_equal_parts(schedule):
    config, steps = schedule
    if config.kind == "wsd":
        stable = range(max(config.warmup, 1), steps - config.decay + 1)
        assert all(lr_factor(config, step, steps) == 1 for step in stable)
        fall = [lr_factor(config, step, steps) for step in range(steps - config.decay + 1, steps + 1)]
        parts = [1 - (1 - config.final) * n / config.decay for n in range(1, config.decay + 1)]
        assert fall == pytest.approx(parts)


def test_cosine_by_hand():
    config = LRScheduleConfig(warmup=2, final=0.2)
    values = [lr_factor(config, step, 10) for step in range(1, 11)]
    assert values[:2] == [0.5, 1.0]
    assert values[5] == pytest.approx((1 + 0.2) / 2)
    assert values[3] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[9] == pytest.approx(0.2)


def test_without_warmup_the_first_step_is_a_whole_one_where_nothing_falls():
    assert lr_factor(LRScheduleConfig(kind="constant"), 1, 5) == 1
    assert lr_factor(LRScheduleConfig(kind="wsd", decay=2), 1, 5) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "wsd"}, "kind = 'wsd' needs decay"),
        ({"kind": "cosine", "decay": 3}, "decay is an option of kind = 'wsd', not of 'cosine'"),
        ({"final": 1.5}, "less than or equal to 1"),
        ({"warmup": -1}, "greater than or equal to 0"),
    ],
)
def test_what_makes_no_schedule_is_refused(arguments, words):
    with pytest.raises(ValidationError, match=words):
        LRScheduleConfig(**arguments)

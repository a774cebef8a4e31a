"""The stored window of recent steps: the same numbers, bit for bit, or an error."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.checkpoint.spike_state import SpikeState

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8), st.integers(0, 9), st.integers(0, 10**9))
def test_what_was_stored_is_parsed_bitwise(steps, in_a_row, skipped):
    losses, norms = tuple(loss for loss, _ in steps), tuple(norm for _, norm in steps)
    state = SpikeState(losses, norms, in_a_row, skipped)
    assert SpikeState.parse(json.loads(json.dumps(asdict(state)))) == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [1.0]}, "losses and grad_norms of different steps"),
        ({"losses": [1.0, float("nan")]}, "losses that are not a list of finite numbers"),
        ({"grad_norms": 3}, "grad_norms that are not a list of finite numbers"),
        ({"losses": ["1", "2"]}, "losses that are not a list of finite numbers"),
        ({"in_a_row": -1}, "in_a_row -1, expected a number from 0"),
        ({"skipped": True}, "skipped True, expected a number from 0"),
    ],
)
def test_anything_else_is_refused(change, message):
    stored = {"losses": [1.0, 2.0], "grad_norms": [0.5, 0.25], "in_a_row": 0, "skipped": 1}
    assert SpikeState.parse(stored) == SpikeState((1.0, 2.0), (0.5, 0.25), 0, 1)
    with pytest.raises(ValueError, match=message):
        SpikeState.parse(stored | change)

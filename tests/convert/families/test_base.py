"""Keys of a configuration of transformers: every mistake at once, by its key."""

import pytest

from longctx.convert.huggingface import from_huggingface
from tests.convert.models import (
    change,
    exported,
    like_mamba2,
    like_minimax,
    refused,
)


def test_all_keys_are_reported_at_once(theirs):
    change(theirs, attention_bias=True, hidden_act="relu", new_thing=3)
    told = refused(theirs)
    assert [line.partition(":")[0] for line in told.splitlines()[1:]] == ["hidden_act", "attention_bias", "new_thing"]


def test_keys_without_a_value_and_those_of_training_are_no_mistake(theirs, tmp_path):
    change(theirs, quantization_config=None, some_switch=False, use_cache=False, initializer_range=0.5)
    from_huggingface(theirs, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "keys", "said"),
    [
        (like_minimax, {"block_size": "x"}, "block_size: 'x' is not a positive integer"),
        (like_minimax, {"block_size": -3}, "block_size: -3 is not a positive integer"),
        (like_mamba2, {"time_step_limit": [0.0, True]}, "time_step_limit: [0.0, True] is not a list of two numbers"),
        (like_mamba2, {"time_step_limit": [0.0, {"__float__": "x"}]}, "is not a list of two numbers"),
    ],
)
def test_values_of_a_wrong_type_are_reported_by_their_key(tmp_path, make, keys, said):
    folder = exported(tmp_path, make())
    change(folder, **keys)
    assert said in refused(folder)

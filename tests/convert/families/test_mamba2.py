"""Mamba-2 files of transformers: the keys that are refused."""

import pytest

from tests.convert.models import (
    change,
    exported,
    like_mamba2,
    refused,
)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_bias": True}, "use_bias: True is not supported, only False: projections have no bias"),
        ({"expand": 3}, "expand: expand * hidden_size must be num_heads * head_dim = 24"),
        ({"time_step_limit": 0.1}, "time_step_limit: [0.1] is not a list of two numbers"),
        ({"time_step_limit": [0.1]}, "time_step_limit: [0.1] is not a list of two numbers"),
        ({"time_step_limit": [0.1, 0.01]}, "mamba2.dt_min: 0.1 is above dt_max, 0.01"),
        ({"conv_kernel": 9}, "mamba2"),
        ({"n_groups": 3}, "mamba2.groups: 3 groups do not divide 4 heads"),
    ],
    ids=str,
)
def test_keys_of_mamba2(tmp_path, keys, said):
    folder = exported(tmp_path, like_mamba2())
    change(folder, **keys)
    assert said in refused(folder)

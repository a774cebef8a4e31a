"""Comparison of models: keys that differ, and which of them change no tensor."""

import pytest

from longctx.checkpoint.compare_models import differences, is_position, position_changes, tensor_differences


def test_within_a_table_only_the_keys_that_differ_are_named():
    actual = {"softmax": {"heads": 4, "rope_theta": 1e4, "rope_scaling": {"kind": "yarn", "factor": 4}}, "moe": None}
    expected = {"softmax": {"heads": 4, "rope_theta": 5e5, "rope_scaling": {"kind": "yarn", "factor": 8}}, "moe": {}}
    assert differences(actual, expected) == [
        "moe: None, expected {}",
        "softmax.rope_scaling.factor: 4, expected 8",
        "softmax.rope_theta: 10000.0, expected 500000.0",
    ]


def test_positions_and_masks_change_no_tensor():
    actual = {"dim": 64, "softmax": {"heads": 4, "rope_theta": 1e4, "rope_scaling": None, "window": 512}}
    expected = {"dim": 64, "softmax": {"heads": 8, "rope_theta": 5e5, "rope_scaling": {"kind": "yarn"}, "window": None}}
    assert tensor_differences(actual, expected) == ["softmax.heads: 4, expected 8"]
    assert position_changes(actual, expected) == [
        "model.softmax.rope_scaling: none → {'kind': 'yarn'}",
        "model.softmax.rope_theta: 10000 → 500000",
        "model.softmax.window: 512 → none",
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("softmax.rope_theta", True),
        ("softmax.rope_scaling.factor", True),
        ("attention_experts.window", True),
        ("retention.rope_theta", True),
        ("retention.window", False),  # it has none
        ("softmax.rotary_dim", False),
        ("rope_theta", False),
        ("dim", False),
    ],
)
def test_only_keys_that_a_mixer_names_are_positions(key, expected):
    assert is_position(key) is expected

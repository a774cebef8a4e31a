"""Qwen3-Next files of transformers: keys, the pattern of layers, the share of rotary channels."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.checkpoint.weights import find_weights
from longctx.convert.families.qwen3_next import _rotary_fraction
from longctx.convert.huggingface import from_huggingface
from longctx.mixers.softmax import SoftmaxConfig
from tests.convert.cases import HOW
from tests.convert.models import (
    change,
    exported,
    like_qwen3_next,
    refused,
)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"layer_types": ["full_attention"] * 3},
            "layer_types: ['full_attention', 'full_attention', 'full_attention'] is",
        ),
        ({"layer_types": [["full_attention"]] * 4}, "is not a list of 4 of linear_attention, full_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "is not a list of 4 of linear_attention, full_attention"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list of layers"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: 0 is not a positive integer"),
        ({"linear_num_key_heads": 3}, "gated_deltanet.qk_heads: 4 heads are not a multiple of 3 query/key heads"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_keys_of_qwen3_next(tmp_path, keys, said):
    folder = exported(tmp_path, like_qwen3_next())
    change(folder, **keys)
    assert said in refused(folder)


def test_of_qwen3_next_layers_that_predict_several_tokens_are_passed_over(tmp_path):
    folder = exported(tmp_path, like_qwen3_next())
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"mtp.layers.0.mlp.gate.weight": torch.ones(3, 12)}, file)
    from_huggingface(folder, tmp_path / "out")


def test_layers_that_are_not_listed_alternate_as_transformers_has_it(tmp_path):
    folder = exported(tmp_path, like_qwen3_next(layers="ES", depth=4))
    change(folder, layer_types="gone", full_attention_interval=2)
    from_huggingface(folder, tmp_path / "out")
    assert find_weights(tmp_path / "out", HOW).model["layers"] == "ES"


def test_the_share_of_channels_that_are_turned_is_found_again_by_rounding_down():
    for head_dim in range(2, 300):
        for rotary_dim in range(2, head_dim + 1, 2):
            layer = SoftmaxConfig(heads=1, head_dim=head_dim, rotary_dim=rotary_dim)
            assert int(head_dim * _rotary_fraction(layer)) == rotary_dim, (head_dim, rotary_dim)

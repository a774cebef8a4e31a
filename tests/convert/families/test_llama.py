"""Llama and Mixtral files of transformers: the keys that are read and refused."""

import pytest

from longctx.checkpoint.weights import find_weights
from longctx.convert.huggingface import from_huggingface
from tests.convert.cases import HOW
from tests.convert.models import (
    change,
    exported,
    like_mixtral,
    refused,
)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is not supported, only llama, "),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu' or 'swish'"),
        ({"attention_bias": True}, "attention_bias: True is not supported, only False: projections have no bias"),
        ({"is_causal": False}, "is_causal: False is not supported, only True"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported, only False"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported, only 0: there is no dropout"),
        ({"hidden_size": "gone"}, "hidden_size: missing"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: 'two' is not a positive integer"),
        ({"sliding_window": 5}, "sliding_window: 5 is unknown"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4} is unknown"),
        ({"architectures": 3}, "architectures: 3 is not supported, only ['LlamaForCausalLM']"),
        ({"model_type": ["llama"]}, "model_type: ['llama'] is not supported, only llama, "),
        ({"rope_parameters": "long"}, "rope_parameters: 'long' is not a table"),
        (
            {"architectures": ["LlamaModel"]},
            "architectures: ['LlamaModel'] is not supported, only ['LlamaForCausalLM']",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling.rope_type: 'yarn' is not supported, only 'default' or",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor: missing"),
        ({"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor: 0.5, which transformers ignores"),
        ({"num_attention_heads": 5}, "num_attention_heads: must divide hidden_size for llama"),
        ({"num_key_value_heads": 4}, "softmax.kv_heads: 6 query heads are not a multiple of 4 key/value heads"),
        ({"rms_norm_eps": 0.0}, "norm_eps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_key_that_changes_the_model_is_refused_by_name(theirs, keys, said):
    change(theirs, **keys)
    told = refused(theirs)
    assert said in told
    assert str(theirs / "config.json") in told


def test_positions_may_be_written_as_before_transformers_5(theirs, tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    change(theirs, rope_parameters="gone", rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    from_huggingface(theirs, tmp_path / "out")
    softmax = find_weights(tmp_path / "out", HOW).model["softmax"]
    assert (softmax["rope_theta"], softmax["rope_scaling"]) == (5e5, scaling)


def test_in_a_mixtral_noise_of_the_router_is_refused(tmp_path):
    folder = exported(tmp_path, like_mixtral())
    change(folder, router_jitter_noise=0.1)
    assert "router_jitter_noise: 0.1 is not supported, only 0" in refused(folder)

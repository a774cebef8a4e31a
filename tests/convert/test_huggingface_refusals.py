"""What is not converted between the built-in model and the files of transformers, and by which words."""

import json
import os
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.checkpoint.weights import find_weights
from longctx.convert import huggingface
from longctx.convert.families.qwen3_next import _rotary_fraction
from longctx.convert.huggingface import from_huggingface, to_huggingface
from longctx.errors import UserError
from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from tests.convert.cases import HOW, save
from tests.convert.families import (
    SOFTMAX,
    change,
    exported,
    like_llama,
    like_mamba2,
    like_minimax,
    like_mixtral,
    like_qwen3_next,
    numbered,
)
from tests.model.cases import hybrid


def refused(folder):
    """The words, and that nothing was written."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        from_huggingface(folder, out)
    assert not list(out.parent.glob("out*"))
    return str(caught.value)


# Configurations that cannot be


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


def test_all_keys_are_told_at_once(theirs):
    change(theirs, attention_bias=True, hidden_act="relu", new_thing=3)
    told = refused(theirs)
    assert [line.partition(":")[0] for line in told.splitlines()[1:]] == ["hidden_act", "attention_bias", "new_thing"]


def test_keys_without_a_value_and_those_of_training_are_no_mistake(theirs, tmp_path):
    change(theirs, quantization_config=None, some_switch=False, use_cache=False, initializer_range=0.5)
    from_huggingface(theirs, tmp_path / "out")


def test_in_a_mixtral_noise_of_the_router_is_refused(tmp_path):
    folder = exported(tmp_path, like_mixtral())
    change(folder, router_jitter_noise=0.1)
    assert "router_jitter_noise: 0.1 is not supported, only 0" in refused(folder)


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


def test_decays_that_are_not_those_of_the_configuration_are_refused(tmp_path):
    folder = exported(tmp_path, like_minimax())
    file, name = folder / "model.safetensors", "model.layers.0.self_attn.slope_rate"
    tensors = load_file(file)
    for changed, said in (
        (1.01 * tensors[name], "does not match the configuration"),
        (torch.ones(3), "expected [3, 1"),
    ):
        save_file(tensors | {name: changed}, file)
        assert said in refused(folder)
    change(folder, block_size=8)
    assert "query_decay is [3, 256, 1] F32, expected [3, 8, 1]" in refused(folder)


@pytest.mark.parametrize(
    ("make", "keys", "said"),
    [
        (like_minimax, {"block_size": "x"}, "block_size: 'x' is not a positive integer"),
        (like_minimax, {"block_size": -3}, "block_size: -3 is not a positive integer"),
        (like_mamba2, {"time_step_limit": [0.0, True]}, "time_step_limit: [0.0, True] is not a list of two numbers"),
        (like_mamba2, {"time_step_limit": [0.0, {"__float__": "x"}]}, "is not a list of two numbers"),
    ],
)
def test_values_of_a_wrong_type_are_told_by_their_key(tmp_path, make, keys, said):
    folder = exported(tmp_path, make())
    change(folder, **keys)
    assert said in refused(folder)


def test_a_norm_of_its_own_that_is_the_models_is_no_difference(tmp_path):
    config = like_minimax(norm_eps=1e-6)
    alike = config.model_copy(update={"lightning": config.lightning.model_copy(update={"norm_eps": None})})
    save(tmp_path / "weights", 1, alike)
    assert to_huggingface(tmp_path / "weights", tmp_path / "theirs").model_type == "minimax"


def test_decays_may_be_missing(tmp_path):
    folder = exported(tmp_path, like_minimax())
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(("_decay", "slope_rate"))}, file)
    from_huggingface(folder, tmp_path / "out")


def test_no_config_and_a_broken_one(theirs):
    (theirs / "config.json").write_text("{")
    assert f"{theirs / 'config.json'} cannot be read: " in refused(theirs)
    (theirs / "config.json").unlink()
    assert f"{theirs} has no config.json" in refused(theirs)


# Files that are not whole


def rewrite(folder, function):
    """Change what lies in the file of the first layer's output matrix."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.layers.0.self_attn.o_proj.weight"]
    tensors = load_file(file)
    function(tensors)
    save_file(tensors, file)
    return index, file


def test_every_tensor_that_is_missing_of_another_shape_or_unknown_is_told(theirs):
    def changed(tensors):
        del tensors["model.layers.0.self_attn.o_proj.weight"]
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(3)

    index, file = rewrite(theirs, changed)
    del index["weight_map"]["model.layers.0.self_attn.o_proj.weight"]
    index["weight_map"]["model.layers.0.self_attn.o_proj.bias"] = file.name
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    change(theirs, intermediate_size=11)
    assert refused(theirs).splitlines()[1:] == [
        "model.layers.0.mlp.down_proj.weight is [12, 10], expected [12, 11]",
        "model.layers.0.mlp.gate_proj.weight is [10, 12], expected [11, 12]",
        "model.layers.0.mlp.up_proj.weight is [10, 12], expected [11, 12]",
        "model.layers.0.self_attn.o_proj.bias [3] is unknown",
        "model.layers.0.self_attn.o_proj.weight [12, 24] is missing",
        "model.layers.1.mlp.down_proj.weight is [12, 10], expected [12, 11]",
        "model.layers.1.mlp.gate_proj.weight is [10, 12], expected [11, 12]",
        "model.layers.1.mlp.up_proj.weight is [10, 12], expected [11, 12]",
    ]


def test_tables_of_positions_are_passed_over(theirs, tmp_path):
    index, file = rewrite(theirs, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(2)}))
    index["weight_map"]["model.rotary_emb.inv_freq"] = file.name
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    from_huggingface(theirs, tmp_path / "out")


def test_weights_that_are_no_weights(theirs):
    name = "model.layers.0.self_attn.o_proj.weight"
    rewrite(theirs, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} is stored as I8, expected F32, BF16, F16" in refused(theirs)


@pytest.mark.parametrize("left", [3, 40, -100], ids=["no length", "half a header", "half of its numbers"])
def test_a_file_that_is_cut_short_is_named(theirs, left):
    file = numbered(theirs, 2)
    os.truncate(file, left if left > 0 else file.stat().st_size + left)
    assert f"{file} cannot be read: " in refused(theirs)


def test_a_file_with_a_damaged_header_is_named(theirs):
    file = numbered(theirs, 2)
    content = bytearray(file.read_bytes())
    content[8:20] = b"\xff" * 12
    file.write_bytes(content)
    assert f"{file} cannot be read: " in refused(theirs)


def test_a_file_that_is_missing_is_named(theirs):
    file = numbered(theirs, 3)
    file.unlink()
    assert f"{file}, listed in model.safetensors.index.json, is missing" in refused(theirs)


def test_an_index_that_names_what_its_files_do_not_have(theirs):
    rewrite(theirs, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight"))
    told = refused(theirs)
    assert (
        "index.json lists tensors that its files do not have: model.layers.0.self_attn.o_proj.weight (in model-" in told
    )


def test_a_file_with_what_the_index_does_not_name(theirs):
    _, file = rewrite(theirs, lambda tensors: tensors.update(more=torch.zeros(2)))
    assert f"{file} has more, but model.safetensors.index.json lists it in no file" in refused(theirs)


def test_an_index_may_not_name_files_elsewhere(theirs):
    index = json.loads((theirs / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: f"../theirs/{file}" for name, file in index["weight_map"].items()}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "listed in model.safetensors.index.json, is missing" in refused(theirs)


def test_an_index_that_is_none(theirs):
    (theirs / "model.safetensors.index.json").write_text('{"metadata": {}}')
    assert "model.safetensors.index.json has no weight_map" in refused(theirs)


def test_a_pickle_is_not_read(theirs):
    for file in theirs.glob("model*"):
        file.unlink()
    (theirs / "pytorch_model.bin").write_bytes(b"")
    told = refused(theirs)
    assert "has neither model.safetensors nor model.safetensors.index.json. pytorch_model.bin is a pickle" in told


@pytest.mark.parametrize("other", [False, True])
def test_a_head_beside_tied_embeddings_has_to_be_them(tmp_path, other):
    folder = exported(tmp_path, like_llama())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + other
    save_file(tensors, folder / "model.safetensors")
    if other:
        assert "lm_head.weight differs from the embedding, but config.json has tie_word_embeddings" in refused(folder)
    else:
        from_huggingface(folder, tmp_path / "out")
        assert "head.weight" not in find_weights(tmp_path / "out", HOW).shapes


def test_what_is_there_is_not_replaced(theirs, tmp_path):
    (tmp_path / "out").mkdir()
    for convert in (from_huggingface, to_huggingface):
        with pytest.raises(UserError, match="out already exists: choose another --out"):
            convert(theirs, tmp_path / "out")


# Models that no class has


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            hybrid(),
            "no model of transformers has layers LS (model.layers) with swiglu (model.ffn); supported are llama: S",
        ),
        (
            like_llama(block="parallel"),
            "the closest, LlamaForCausalLM, differs in model.block: 'parallel', expected 'sequential'",
        ),
        (like_llama(softmax=SOFTMAX.model_copy(update={"window": 9})), "model.softmax.window: 9, expected None"),
        (like_mixtral(score="sigmoid", shared=1), "model.moe.score: 'sigmoid', expected 'softmax'; model.moe.shared"),
        (like_mixtral(bias_rate=0.1), "model.moe.bias_rate: 0.1, expected 0.0"),
        (like_mamba2(head_dim=5), "expand: expand * hidden_size must be num_heads * head_dim = 20"),
        (
            like_qwen3_next(gated_deltanet=GatedDeltaNetConfig(heads=4, head_dim=5, negative_eigenvalues=True)),
            "model.gated_deltanet.negative_eigenvalues: True, expected False",
        ),
        (
            like_minimax(lightning=LightningConfig(heads=3, head_dim=4), block="sequential"),
            "model.block: 'sequential', expected 'postnorm'; model.lightning.form: 'transnormer', expected 'minimax'",
        ),
        (
            like_minimax(lightning=LightningConfig(heads=2, head_dim=6, form="minimax")),
            "model.lightning.head_dim: 6, expected",
        ),
        (like_qwen3_next(softmax=SOFTMAX), "model.softmax.output_gate: False, expected True; model.softmax.qk_norm"),
        (like_llama(norm="zero_centered_rms"), "model.norm: 'zero_centered_rms', expected 'rms'"),
        (like_llama(heads=HeadMixtureConfig(mixers=("softmax",), active=2)), "model.heads.active: 2, expected None"),
    ],
    ids=[
        "layers",
        "block",
        "window",
        "two of experts",
        "a bias",
        "a width",
        "a rule",
        "a form",
        "lightning heads",
        "a gate",
        "norms",
        "heads",
    ],
)
def test_a_model_that_no_class_has_is_told_by_every_key(tmp_path, config, said):
    save(tmp_path / "built-in", 0, config)
    with pytest.raises(UserError) as caught:
        to_huggingface(tmp_path / "built-in", tmp_path / "out")
    assert said in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_how_a_model_is_trained_is_no_part_of_it(tmp_path):
    config = like_mixtral(z=0.1, jitter=0.2, capacity=2.0)
    save(tmp_path / "built-in", 0, config)
    to_huggingface(tmp_path / "built-in", tmp_path / "out")


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path):
    save(tmp_path / "built-in", 0, like_llama())
    with (
        patch.object(huggingface, "write_file", side_effect=OSError(28, "No space left on device")),
        pytest.raises(UserError, match=r"out: cannot be written: No space left on device \("),
    ):
        to_huggingface(tmp_path / "built-in", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))

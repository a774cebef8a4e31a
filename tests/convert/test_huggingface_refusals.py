"""What is not converted between the built-in model and the files of transformers, and by which words."""

import json
import os
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.checkpoint.weights import find_weights
from longctx.convert import huggingface
from longctx.convert.huggingface import from_huggingface, to_huggingface
from longctx.errors import UserError
from longctx.mixers.deltanet import GatedDeltaNetConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.lightning import LightningConfig
from tests.convert.cases import HOW, save
from tests.convert.models import (
    SOFTMAX,
    change,
    exported,
    like_llama,
    like_mamba2,
    like_minimax,
    like_mixtral,
    like_qwen3_next,
    numbered,
    refused,
)
from tests.model.cases import hybrid

# Configurations that cannot be


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


def test_every_tensor_that_is_missing_of_another_shape_or_unknown_is_reported(theirs):
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
def test_a_model_that_no_class_has_is_reported_by_every_key(tmp_path, config, said):
    save(tmp_path / "built-in", 0, config)
    with pytest.raises(UserError) as caught:
        to_huggingface(tmp_path / "built-in", tmp_path / "out")
    assert said in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_how_a_model_is_trained_is_no_part_of_it(tmp_path):
    config = like_mixtral(z=0.1, jitter=0.2, capacity=2.0)
    save(tmp_path / "built-in", 0, config)
    to_huggingface(tmp_path / "built-in", tmp_path / "out")


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path):
    save(tmp_path / "built-in", 0, like_llama())
    with (
        patch.object(huggingface, "write_file", side_effect=OSError(28, "No space left on device")),
        pytest.raises(UserError, match=r"out: cannot be written: No space left on device \("),
    ):
        to_huggingface(tmp_path / "built-in", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))

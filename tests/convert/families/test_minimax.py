"""MiniMax files of transformers: decays and norms."""

import torch
from safetensors.torch import load_file, save_file

from longctx.convert.huggingface import from_huggingface, to_huggingface
from tests.convert.cases import save
from tests.convert.models import (
    change,
    exported,
    like_minimax,
    refused,
)


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

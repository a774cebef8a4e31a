"""Between the built-in model and the files of transformers: there and back, in pieces, and what is written beside them.

That the logits are those of transformers is shown where that is installed (tests/adapters/huggingface).
"""

import json
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.checkpoint.weights import Weights, find_weights, shapes_of
from longctx.convert import huggingface
from longctx.convert import row_table as rows
from longctx.convert.families import FAMILIES
from longctx.convert.huggingface import RECIPE, built_in_config, from_huggingface, to_huggingface
from longctx.errors import UserError
from tests.convert.cases import HOW, values
from tests.convert.models import (
    MODELS,
    exported,
    like_llama,
    like_mixtral,
    numbered,
)
from tests.model.cases import VOCABULARY

# Published models

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MAMBA_CODESTRAL_7B = {
    "architectures": ["Mamba2ForCausalLM"],
    "chunk_size": 256,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.1,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "norm_before_gate": True,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 256,
    "time_step_scale": 1.0,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 32768,
}


@pytest.mark.parametrize(
    ("values", "parameters"),
    [(LLAMA_3_1_8B, 8_030_261_248), (MIXTRAL_8X7B, 46_702_792_704), (MAMBA_CODESTRAL_7B, 7_285_403_648)],
    ids=["Llama 3.1 8B", "Mixtral 8x7B", "Mamba Codestral 7B"],
)
def test_a_published_configuration_is_read_and_has_the_published_number_of_parameters(values, parameters):
    family = FAMILIES[values["model_type"]]
    model, problems = built_in_config(family, values)
    assert problems == []
    table = family.table(model, shapes_of(model, model.vocab_size))
    assert sum(whole.shape.numel() for whole in table.ours.values()) == parameters
    assert sum(whole.shape.numel() for whole in table.theirs.values()) == parameters


# There and back


@pytest.mark.parametrize("name", MODELS)
def test_what_was_exported_is_imported_as_it_was(tmp_path, name):
    folder = exported(tmp_path, MODELS[name], shard_size=4000)
    done = from_huggingface(folder, tmp_path / "again")
    before, after = (values(find_weights(tmp_path / place, HOW)) for place in ("built-in", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert done.parameters == sum(value.numel() for value in before.values())
    assert done.files == len(list(folder.glob("*.safetensors"))) > 1


def test_files_hold_no_more_than_they_may_and_the_index_says_what_is_where(tmp_path):
    folder = exported(tmp_path, like_mixtral(), shard_size=4000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    total = 0
    for file in files:
        tensors = load_file(file)
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 4000 or len(tensors) == 1
        total += size
    assert index["metadata"] == {"total_parameters": total // 4, "total_size": total}


def test_one_file_has_no_index(tmp_path):
    folder = exported(tmp_path, like_llama())
    assert {path.name for path in folder.iterdir()} == {"checksums.json", "config.json", "model.safetensors"}


def test_in_bfloat16_numbers_are_rounded_once(tmp_path):
    folder = exported(tmp_path, like_llama(), dtype="bf16")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    want = find_weights(tmp_path / "built-in", HOW).read("embedding.weight")
    assert torch.equal(embedding, want.bfloat16())


def test_half_precision_is_read_as_float32(theirs, tmp_path):
    for file in theirs.glob("*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    from_huggingface(theirs, tmp_path / "out")
    got = values(find_weights(tmp_path / "out", HOW))
    want = load_file(numbered(theirs, 1))
    assert torch.equal(got["embedding.weight"], want["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_read_whole_that_is_larger_than_a_piece(tmp_path, name):
    """With buffers of 256 bytes; the numbers are the same."""
    folder = exported(tmp_path, MODELS[name])
    taken, right = [], huggingface.TensorFolder.read_rows

    def counted(self, tensor, begin, end):
        found = right(self, tensor, begin, end)
        if not tensor.endswith(("_decay", "slope_rate")):  # compared, not converted
            taken.append(found.numel() * 4)
        return found

    with patch.object(rows, "BUFFER_BYTES", 256), patch.object(huggingface.TensorFolder, "read_rows", counted):
        from_huggingface(folder, tmp_path / "again")
    assert max(taken) <= 256
    back = []
    right_read = type(find_weights(tmp_path / "again", HOW)).read_rows

    def read_rows(self, tensor, begin, end):
        found = right_read(self, tensor, begin, end)
        back.append(found.numel() * 4)
        return found

    with patch.object(rows, "BUFFER_BYTES", 256), patch.object(Weights, "read_rows", read_rows):
        to_huggingface(tmp_path / "again", tmp_path / "back")
    # A row of the first dimension of experts is all of an expert's rows.
    assert max(back) <= max(256, 4 * 20 * 12)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_where_it_came_from_and_the_table_of_its_model_stand_beside_it(theirs, tmp_path):
    from_huggingface(theirs, tmp_path / "out")
    said = json.loads((tmp_path / "out/weights.json").read_text())
    assert said["origin"] == {
        "command": "longctx convert from-huggingface",
        "source": str(theirs),
        "model_type": "llama",
    }
    assert said["model"]["vocab_size"] == VOCABULARY
    assert (tmp_path / "out" / RECIPE).read_text().startswith("[model]\n")


def test_how_it_will_be_trained_may_be_said(tmp_path):
    folder = exported(tmp_path, like_mixtral())
    from_huggingface(folder, tmp_path / "out", ["model.moe.balance=0.5", "model.moe.z=1e-3"])
    moe = find_weights(tmp_path / "out", HOW).model["moe"]
    assert (moe["balance"], moe["z"]) == (0.5, 1e-3)
    assert "balance = 0.5" in (tmp_path / "out" / RECIPE).read_text()
    with pytest.raises(
        UserError, match=r"only model\.moe\.balance, .* by the source: model\.moe\.active: 1, expected 2"
    ):
        from_huggingface(folder, tmp_path / "other", ["model.moe.active=1"])
    with pytest.raises(UserError, match=r"model\.moe\.balanc: unknown key; did you mean 'balance'"):
        from_huggingface(folder, tmp_path / "other", ["model.moe.balanc=1"])
    assert not (tmp_path / "other").exists()

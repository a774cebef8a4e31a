"""Models of the shipped recipes beside the published ones: configuration and number of parameters."""

import pytest

from longctx.convert.families import FAMILIES
from longctx.convert.huggingface import built_in_config, resolved
from longctx.launch.recipes import parameters
from longctx.recipe import load

LLAMA_31_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
"""The keys of config.json of meta-llama/Llama-3.1-8B that concern the model."""
LLAMA_3_8B = {**LLAMA_31_8B, "max_position_embeddings": 8192, "rope_scaling": None}
"""Those of meta-llama/Meta-Llama-3-8B."""
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
"""Those of Qwen/Qwen3-Next-80B-A3B-Instruct."""

PARAMETERS = {
    # One per element of the published tensors; Qwen3-Next without its multi-token prediction head.
    "llama31-8b-long": 8_030_261_248,
    "moh-llama3-8b": 8_030_261_248,  # the router by query norms has none
    "qwen3-next-256k": 79_674_391_296,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "minimax-01-shape": 456_089_655_296,  # published as 456B
    "bamba-9b": 9_780_235_392,  # published as 9.78B
    # Published as classes of size; vocabulary and feed-forward are ours, as the heads of the recipes say.
    "tnl-7b": 6_836_965_376,
    "linear-llama3-1b": 1_072_238_592,
    "linear-llama3-1b-hybrid": 1_072_238_080,
    "bam-seed": 1_084_786_688,
    "bam-upcycle": 3_551_299_584,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    assert parameters(load(name)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "config"),
    [("llama31-8b-long", LLAMA_31_8B), ("moh-llama3-8b", LLAMA_3_8B), ("qwen3-next-256k", QWEN3_NEXT)],
)
def test_converted_weights_are_those_of_the_recipe(name, config):
    published, problems = built_in_config(FAMILIES[config["model_type"]], config)
    assert problems == []
    assert published is not None
    found, expected = (
        # `longctx convert upcycle` adds the mixture of heads; balancing is an option of training.
        {key: value for key, value in resolved(model).items() if not key.startswith("heads.") and key != "moe.balance"}
        for model in (load(name).model, published)
    )
    assert found == expected


def test_minimax_is_built_of_the_published_parts():
    """transformers rotates all channels of a head, where the released model rotates half: not by `built_in_config`."""
    model = load("minimax-01-shape").model
    assert model.pattern == "LLLLLLLS" * 10
    assert (model.dim, model.vocab_size, model.tie_embeddings, model.block) == (6144, 200_064, False, "postnorm")
    assert set(model.residual.values()) == {((2 * 80) ** 0.25, 1.0)}
    attention = (model.softmax.heads, model.softmax.kv_heads, model.softmax.head_dim, model.softmax.rotary_dim)
    assert attention == (64, 8, 128, 64)
    assert (model.moe.experts, model.moe.active, model.moe.hidden) == (32, 2, 9216)


def test_bamba_has_softmax_in_three_of_its_layers():
    pattern = load("bamba-9b").model.pattern
    assert [layer for layer, letter in enumerate(pattern) if letter == "S"] == [9, 18, 27]
    assert pattern.count("M") == 29

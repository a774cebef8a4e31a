"""Models of transformers made the built-in one and back: equal logits in both, and the same tensors to the bit."""

import json
from importlib import import_module

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("transformers", reason="needs the extra: pip install -e '.[huggingface]'")

from longctx.checkpoint.weights import find_weights
from longctx.convert.families import FAMILIES
from longctx.convert.families.base import Keys
from longctx.convert.huggingface import RECIPE, from_huggingface, to_huggingface
from longctx.model.decoder import Decoder
from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from longctx.recipe import load
from tests.compare.peers import in_float64
from tests.convert.cases import model_of as model_of_weights
from tests.convert.cases import save
from tests.convert.models import MODELS as BUILT_IN

pytestmark = pytest.mark.usefixtures("plain_torch")

LENGTH, VOCABULARY = 43, 40
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 6,
    "n_groups": 2,
    "expand": 2,
}
QWEN = COMMON | {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 14,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "num_hidden_layers": 5,
}
MODELS = {
    "llama": ("llama", COMMON),
    "llama, as 3.1": ("llama", COMMON | {"rope_parameters": LLAMA_3_1, "head_dim": 10, "rms_norm_eps": 1e-3}),
    "llama, tied": ("llama", COMMON | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mixtral": ("mixtral", COMMON | EXPERTS),
    "mixtral, with a window": ("mixtral", COMMON | EXPERTS | {"sliding_window": 7, "head_dim": 6}),
    "qwen3_next": ("qwen3_next", QWEN),
    "qwen3_next, some layers dense": (
        "qwen3_next",
        QWEN
        | {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "partial_rotary_factor": 0.6,
            "head_dim": 10,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_next, no experts": ("qwen3_next", QWEN | {"num_experts": 0, "linear_num_key_heads": 4}),
    "minimax": ("minimax", COMMON | EXPERTS),
    "minimax, with factors": (
        "minimax",
        COMMON
        | EXPERTS
        | {
            "num_attention_heads": 6,
            "head_dim": 4,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "sliding_window": 7,
            "full_attn_alpha_factor": 3.5,
            "linear_attn_alpha_factor": 1.5,
            "linear_attn_beta_factor": 0.5,
            "mlp_alpha_factor": 2,
            "mlp_beta_factor": 0.7,
        },
    ),
    "mamba2": ("mamba2", MAMBA),
    "mamba2, with limits": (
        "mamba2",
        MAMBA | {"time_step_limit": (0.01, 0.5), "use_conv_bias": False, "tie_word_embeddings": True, "conv_kernel": 3},
    ),
}


def model_of(name, like=None):
    """A model with weights of chance, or with those of another; in the default dtype."""
    kind, settings = MODELS[name]
    # By name: fla, where it is installed, puts models of its own into the Auto classes.
    modeling = import_module(f"transformers.models.{kind}.modeling_{kind}")
    named = {name.lower(): value for name, value in vars(modeling).items()}
    short = kind.replace("_", "")
    config = named[f"{short}config"](**settings, attn_implementation="eager")
    model = named[f"{short}forcausallm"](config)
    model.config._experts_implementation = "eager"  # grouped products are for float32 and narrower
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if like is not None:
                parameter.copy_(like.get_parameter(key))
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * drawn if parameter.dim() > 1 else parameter + 0.3 * drawn)
    return model.eval()


def tokens():
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def stored(folder):
    """Every tensor of a folder's files, by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return found


def built_in(folder, place):
    """The built-in model that a recipe which extends the folder's gives, with the folder's weights, in float64."""
    (place / "mine.toml").write_text(
        f'extends = "{folder / RECIPE}"\nname = "mine"\n[data]\npath = "corpus"\nsequence_length = 64\n'
        "[train]\nsteps = 1\n[checkpoint]\nevery = 1\n"
    )
    config, weights = load(place / "mine.toml").model, find_weights(folder, "here")
    weights.check(config, config.vocabulary_rows(7))
    model = Decoder(config, VOCABULARY).double()
    initialise(model, seed=99)
    model.load_state_dict({name: weights.read(name) for name in weights.shapes})
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_built_in_model_has_its_logits_and_gives_its_files_back(tmp_path, name):
    x = tokens()
    source = model_of(name)
    source.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    with in_float64():
        theirs = model_of(name, source)
        want = torch.cat([theirs(input_ids=x[:, :17]).logits, theirs(input_ids=x[:, 17:]).logits], dim=1)
    from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours = built_in(tmp_path / "ours", tmp_path)
    got = ours(x, Layout((0, 17, LENGTH)))
    assert (got - want).norm() <= 1e-9 * want.norm()

    to_huggingface(tmp_path / "ours", tmp_path / "back", shard_size=30_000)
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    want, got = (logits_of(tmp_path / folder, x) for folder in ("theirs", "back"))
    # The same numbers, which lie elsewhere in memory: products may take them in another order.
    assert (got - want).norm() <= 1e-6 * want.norm()


def logits_of(folder, x):
    """Of the class that the folder's configuration names, which finds each of its tensors and no other."""
    # Not by an Auto class: fla, where it is installed and loaded, puts models of its own into these.
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, told = getattr(import_module("transformers"), name).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    model.config._experts_implementation = "eager"  # grouped products want widths that are multiples of 16 bytes
    return model.eval()(input_ids=x).logits.float()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_comes_back_to_the_bit(tmp_path, name):
    model_of(name).bfloat16().save_pretrained(tmp_path / "theirs")
    from_huggingface(tmp_path / "theirs", tmp_path / "ours")
    to_huggingface(tmp_path / "ours", tmp_path / "back", dtype="bf16")
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_model_that_is_no_import_is_loaded_with_its_logits(tmp_path, name):
    """In float32, as transformers loads it, its angles of positions too."""
    save(tmp_path / "ours", 0, BUILT_IN[name])
    to_huggingface(tmp_path / "ours", tmp_path / "theirs")
    x = tokens() % 29
    want = model_of_weights(tmp_path / "ours", BUILT_IN[name])(x, Layout((0, LENGTH)))
    assert (logits_of(tmp_path / "theirs", x) - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_key_that_is_not_there_has_transformers_default(family):
    """Removed one by one: what is then read is the same, or the key is asked for."""
    modeling = import_module(f"transformers.models.{family.model_type}.configuration_{family.model_type}")
    named = {name.lower(): value for name, value in vars(modeling).items()}
    values = json.loads(named[f"{family.model_type.replace('_', '')}config"]().to_json_string(use_diff=False))
    keys = Keys(values)
    whole = family.read(keys)
    assert not keys.problems
    for name in values:
        without = Keys({key: value for key, value in values.items() if key != name})
        found = family.read(without)
        assert found == whole or without.problems, name

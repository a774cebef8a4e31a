"""Weights to Megatron-Core's checkpoints and back; that Megatron reads and writes these is seen in tests/adapters."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp

from longctx.checkpoint.storage import Reader
from longctx.checkpoint.weights import find_weights
from longctx.convert.megatron import from_megatron, to_megatron
from longctx.errors import UserError
from longctx.mixers import MIXERS
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from tests.convert.cases import HOW, routed, save, values
from tests.model.cases import VOCABULARY, hybrid


def of(letters, **changes):
    """A model of some mixers with four heads."""
    fields = {"layers": letters, "depth": 2 * len(letters), "dim": 16, "lightning": None, "softmax": None}
    for letter in letters:
        more = {"experts": 3} if letter == "A" else {}
        fields[MIXERS[letter].name] = MIXERS[letter].model_validate({"heads": 4} | more)
    return ModelConfig(**(hybrid().model_dump(exclude_none=True) | fields | changes))


MODELS = {
    "a hybrid with grouped heads": hybrid(),
    "its head untied": hybrid(tie_embeddings=False),
    "softmax layers alone, stacked": hybrid(layers="S", lightning=None),
    "lightning layers alone, stacked": hybrid(layers="L", softmax=None),
    **{f"mixer {letter}": of(letter) for letter in "MGEKRH"},
    "many mixers": of("MESK"),
    "mixtures of heads": of("MES", heads=HeadMixtureConfig(mixers=("softmax", "mamba2"), shared=1, active=2)),
    "mixtures of heads alone, stacked": of("S", heads=HeadMixtureConfig(mixers=("softmax",), shared=2, active=1)),
    "norms of queries in a mixture of heads": of(
        "S", heads=HeadMixtureConfig(mixers=("softmax",), active=2), softmax=SoftmaxConfig(heads=4, qk_norm="rms")
    ),
    "a group of heads that shared and routed ones read": of(
        "MB",
        heads=HeadMixtureConfig(mixers=("mamba2", "linear"), shared=1, active=2),
        linear={"heads": 4, "kv_heads": 2},
        mamba2={"heads": 4, "state_dim": 7},
    ),
    "a learned map of features": of(
        "BS",
        linear={"heads": 4, "feature_map": "hedgehog"},
        heads=HeadMixtureConfig(mixers=("linear",), shared=2, active=1),
    ),
    "a learned map of features alone, stacked": of("B", linear={"heads": 4, "feature_map": "hedgehog"}),
    "attention experts": of("SA"),
}


def stored(folder):
    """The tensors of a checkpoint of Megatron's, by name: their shapes."""
    entries = Reader(folder).read_metadata().state_dict_metadata
    return {name: list(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}


# "many mixers" has layers of these.
AGAIN = ("mixer M", "mixer E", "mixer K")


@pytest.mark.parametrize(
    "config",
    [pytest.param(x, id=name, marks=[pytest.mark.slow] * (name in AGAIN)) for name, x in MODELS.items()],
)
def test_there_and_back_every_number_is_the_same(tmp_path, config):
    save(tmp_path / "weights", 3, config)
    to_megatron(tmp_path / "weights", tmp_path / "megatron")
    done = from_megatron(tmp_path / "megatron", config, tmp_path / "back")
    back, weights = find_weights(tmp_path / "back", HOW), find_weights(tmp_path / "weights", HOW)
    back.check(config, VOCABULARY)
    want = values(weights)
    assert {name: torch.equal(x, want[name]) for name, x in values(back).items()} == dict.fromkeys(want, True)
    assert done.parameters == sum(x.numel() for x in want.values())


def test_layers_that_are_alike_are_stacked_as_megatron_does(tmp_path):
    save(tmp_path / "weights", 3, hybrid(layers="S", lightning=None))
    to_megatron(tmp_path / "weights", tmp_path / "megatron")
    assert stored(tmp_path / "megatron" / "release") == {
        "embedding.word_embeddings.weight": [VOCABULARY, 12],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": [3, 12],
        "decoder.layers.self_attention.linear_qkv.weight": [3, 40, 12],
        "decoder.layers.self_attention.linear_proj.weight": [3, 12, 24],
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": [3, 12],
        "decoder.layers.mlp.linear_fc1.weight": [3, 20, 12],
        "decoder.layers.mlp.linear_fc2.weight": [3, 12, 10],
        "decoder.final_layernorm.weight": [12],
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_group_of_heads_has_its_queries_its_key_and_its_value(tmp_path):
    save(tmp_path / "weights", 3, hybrid())
    to_megatron(tmp_path / "weights", tmp_path / "megatron")
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    found = {name: torch.empty(40, 12)}
    dcp.load(found, checkpoint_id=tmp_path / "megatron" / "release", no_dist=True)  # noqa: TID251 - its own
    q, k, v = find_weights(tmp_path / "weights", HOW).read("blocks.1.mixer.qkv.weight").split([24, 8, 8])
    groups = zip(q.split(12), k.split(4), v.split(4), strict=True)
    assert torch.equal(found[name], torch.cat([part for group in groups for part in group]))


# What is refused


def write(tmp_path, config=None):
    save(tmp_path / "weights", 3, config or hybrid())
    to_megatron(tmp_path / "weights", tmp_path / "megatron")
    return tmp_path / "megatron"


def test_a_checkpoint_of_another_model_names_every_tensor(tmp_path):
    source = write(tmp_path)
    with pytest.raises(UserError) as caught:
        from_megatron(source, hybrid(depth=2, tie_embeddings=False), tmp_path / "out")
    assert "output_layer.weight [29, 12] is missing" in str(caught.value)
    assert "decoder.layers.2.mlp.linear_fc1.weight [20, 12] is not part of the model" in str(caught.value)
    with pytest.raises(UserError, match=r"decoder.layers.0.mlp.linear_fc2.weight is \[12, 10\], expected \[12, 14\]"):
        from_megatron(source, hybrid(swiglu={"hidden": 14}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_other_layers_names_what_is_missing(tmp_path):
    save(tmp_path / "weights", 3, hybrid(layers="S", lightning=None))
    to_megatron(tmp_path / "weights", tmp_path / "megatron")
    heads = HeadMixtureConfig(mixers=("softmax",), active=3)
    for config, name in (
        (hybrid(layers="L", softmax=None), "qkvu.weight"),
        (hybrid(layers="S", lightning=None, heads=heads), "head_router.weight"),
    ):
        with pytest.raises(UserError) as caught:
            from_megatron(tmp_path / "megatron", config, tmp_path / "out")
        assert f"decoder.layers.0.self_attention.mixer.{name}" in str(caught.value)
        assert "decoder.layers.2.self_attention.linear_qkv.weight [40, 12] is not part of the model" in str(
            caught.value
        )


def test_a_vocabulary_of_other_rows_says_which(tmp_path):
    with pytest.raises(UserError, match=r"30 in the recipe, but .* has 29 rows: set model.vocab_size=29"):
        from_megatron(write(tmp_path), hybrid(vocab_size=30), tmp_path / "out")


def test_a_checkpoint_that_does_not_say_its_model_needs_a_recipe(tmp_path):
    with pytest.raises(UserError, match="does not contain the model's configuration: add --to RECIPE"):
        from_megatron(write(tmp_path), None, tmp_path / "out")


def test_a_damaged_one_is_named(tmp_path):
    source = write(tmp_path)
    (source / "release" / ".metadata").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"release cannot be read: .metadata"):
        from_megatron(source, hybrid(), tmp_path / "out")
    (source / "release" / ".metadata").unlink()
    with pytest.raises(UserError, match=r"release has no .metadata: use as SOURCE a Megatron checkpoint in the format"):
        from_megatron(source, hybrid(), tmp_path / "out")


def test_a_file_that_is_cut_short_leaves_nothing(tmp_path):
    source = write(tmp_path)
    largest = max((source / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        from_megatron(source, hybrid(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


UNLIKE = {
    "experts": (routed(), "model.ffn"),
    "blocks in parallel": (hybrid(block="parallel"), "model.block"),
    "norms of queries": (hybrid(softmax=SoftmaxConfig(heads=6, head_dim=4, qk_norm="rms")), "qk_norm"),
}


@pytest.mark.parametrize(("config", "key"), UNLIKE.values(), ids=UNLIKE)
def test_a_model_that_megatron_has_no_layers_for_is_refused(tmp_path, config, key):
    save(tmp_path / "weights", 3, config)
    with pytest.raises(UserError, match=key):
        to_megatron(tmp_path / "weights", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_a_release(tmp_path):
    source = write(tmp_path)
    assert (source / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert json.loads((source / "release" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"

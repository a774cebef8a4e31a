"""A routed model made of dense ones begins with what they have learned, and nothing is lost on the way unsaid."""

import errno
import json
import os
import shutil
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.multiprocessing.reductions import StorageWeakRef

from longctx.checkpoint import lazy_tensors
from longctx.checkpoint.weights import find_weights
from longctx.convert import upcycle as module
from longctx.convert.upcycle import upcycle
from longctx.errors import UserError
from longctx.mixers.attention_experts import AttentionExpertsConfig
from longctx.mixers.head_mixture import HeadMixtureConfig
from longctx.model.decoder import Decoder
from longctx.model.ffn import SwigluConfig
from longctx.model.initialise import initialise
from longctx.model.moe import MoeConfig
from longctx.moe import upcycle as rules
from longctx.parallel.layout import Layout
from tests.convert.cases import HOW, model_of, recipe, routed, save, values
from tests.model.cases import VOCABULARY, hybrid, tokens

LAYOUT = Layout((0, 9, 23))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Three dense models of one shape."""
    folder = tmp_path_factory.mktemp("dense")
    return [save(folder / str(seed), seed) for seed in range(3)]


def made(sources, out, config):
    """The notes, and the tensors that were written."""
    done = upcycle(sources, recipe(config), out)
    return done.notes, values(find_weights(out, HOW))


# What stands where


def test_of_one_source_every_expert_is_its_feed_forward_and_all_else_is_its_own(dense, tmp_path):
    _, found = made(dense[:1], tmp_path / "out", routed())
    source = values(find_weights(dense[0], HOW))
    for layer in (0, 2):
        for matrix in ("gate_up", "down"):
            dense_one = source.pop(f"blocks.{layer}.ffn.{matrix}.weight")
            experts = found.pop(f"blocks.{layer}.ffn.experts.{matrix}")
            assert torch.equal(experts, dense_one.expand_as(experts))
        assert torch.equal(found.pop(f"blocks.{layer}.ffn.bias"), torch.zeros(4))
        found.pop(f"blocks.{layer}.ffn.router.weight")
    assert found.keys() == source.keys()
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_of_several_expert_e_is_of_source_e_mod_n_and_all_else_is_the_mean(dense, tmp_path):
    notes, found = made(dense, tmp_path / "out", routed(experts=5))
    sources = [values(find_weights(path, HOW)) for path in dense]
    for layer in (0, 2):
        for matrix in ("gate_up", "down"):
            experts = found.pop(f"blocks.{layer}.ffn.experts.{matrix}")
            for expert in range(5):
                assert torch.equal(experts[expert], sources[expert % 3][f"blocks.{layer}.ffn.{matrix}.weight"])
    rest = [name for name in found if name in sources[0]]
    assert len(rest) == len(sources[0]) - 4
    for name in rest:
        mean = torch.stack([source[name] for source in sources]).double().mean(dim=0)
        assert torch.equal(found[name], mean.float()), name
    assert notes == [
        "Experts come from several sources, other tensors are means: the initial output equals no source's."
    ]


def test_equal_sources_give_themselves_to_the_bit(dense, tmp_path):
    made([dense[1]] * 3, tmp_path / "three", routed(experts=3))
    made([dense[1]], tmp_path / "one", routed(experts=3))
    three, one = (values(find_weights(tmp_path / name, HOW)) for name in ("three", "one"))
    assert all(torch.equal(three[name], one[name]) for name in one)


def test_routers_are_drawn_as_in_a_model_that_is_not_made_of_others(dense, tmp_path):
    _, found = made(dense[:1], tmp_path / "out", routed())
    fresh = Decoder(routed(), VOCABULARY)
    initialise(fresh, recipe(routed()).seed)
    for layer in (0, 2):
        assert torch.equal(found[f"blocks.{layer}.ffn.router.weight"], fresh.blocks[layer].ffn.router.weight)


def test_where_it_came_from_and_what_it_is_stand_beside_it(dense, tmp_path):
    made(dense[:2], tmp_path / "out", routed())
    said = json.loads((tmp_path / "out/weights.json").read_text())
    assert said["origin"] == {
        "command": "longctx convert upcycle",
        "sources": [{"path": str(path), "step": None} for path in dense[:2]],
        "recipe": "routed",
        "seed": 5,
    }
    assert said["model"]["vocab_size"] == VOCABULARY
    assert said["model"]["moe"]["experts"] == 4
    there = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert said["files"] == {name: size for name, size in there.items() if name != "weights.json"}


# What it computes


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"active": 1},
        {"score": "sigmoid"},
        {"experts": 6, "groups": 3, "active_groups": 2, "active": 3},
        {"score": "sigmoid", "experts": 6, "groups": 3, "active_groups": 1},
        {"shared": 1},
    ],
    ids=str,
)
def test_made_of_one_model_it_computes_what_that_does(dense, tmp_path, changes):
    notes, _ = made(dense[:1], tmp_path / "out", routed(**changes))
    assert notes == ["The initial output equals the source's."]
    text = tokens(23)
    expected = model_of(dense[0], hybrid())(text, LAYOUT)
    out = model_of(tmp_path / "out", routed(**changes))(text, LAYOUT)
    assert (out - expected).norm() <= 1e-10 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalize": False}, "model.moe.normalize = false, so that a token's weights do not sum to 1"),
        ({"scale": 2.5}, "model.moe.scale = 2.5 multiplies the experts' output"),
        ({"capacity": 0.5}, "model.moe.capacity drops tokens in training"),
    ],
)
def test_what_keeps_it_from_computing_the_same_is_said(dense, tmp_path, changes, said):
    notes, _ = made(dense[:1], tmp_path / "out", routed(**changes))
    assert notes == [f"The initial output differs from the source's: {said}."]
    text = tokens(23)
    expected = model_of(dense[0], hybrid())(text, LAYOUT)
    out = model_of(tmp_path / "out", routed(**changes))(text, LAYOUT)
    assert (out - expected).norm() > 1e-3 * expected.norm()


def attention_experts(kv, block, **changes):
    """`hybrid` with attention experts in the place of its softmax layers, and top-1 experts."""
    softmax = hybrid().softmax
    same = {key: getattr(softmax, key) for key in ("heads", "kv_heads", "head_dim")}
    table = AttentionExpertsConfig(experts=3, kv=kv, **same)
    return hybrid(
        layers="LA",
        softmax=None,
        attention_experts=table.model_copy(update=changes),
        block=block,
        ffn="moe",
        swiglu=None,
        moe=MoeConfig(experts=3, active=1, hidden=10),
    )


@torch.no_grad()
@pytest.mark.parametrize("kv", ["each", "shared"])
@pytest.mark.parametrize("block", ["sequential", "parallel"])
def test_attention_experts_of_one_model_compute_what_it_does(tmp_path, kv, block):
    source = save(tmp_path / "seed", 3, hybrid(block=block))
    config = attention_experts(kv, block)
    notes, _ = made([source], tmp_path / "out", config)
    assert notes == ["The initial output equals the source's."]
    text = tokens(23)
    expected = model_of(source, hybrid(block=block))(text, LAYOUT)
    out = model_of(tmp_path / "out", config)(text, LAYOUT)
    assert (out - expected).norm() <= 1e-10 * expected.norm()


@torch.no_grad()
def test_attention_experts_of_several_models_are_theirs_in_turn(dense, tmp_path):
    config = attention_experts("each", "sequential")
    _, found = made(dense[:2], tmp_path / "out", config)
    seeds = [values(find_weights(path, HOW)) for path in dense[:2]]
    got = found["blocks.1.mixer.qkv.weight"].unflatten(0, (-1, 4))
    for expert in range(3):
        want = seeds[expert % 2]["blocks.1.mixer.qkv.weight"].unflatten(0, (-1, 4))
        assert torch.equal(got[6 * expert : 6 * expert + 6], want[:6])
        assert torch.equal(got[18 + 2 * expert : 20 + 2 * expert], want[6:8])
    norms = torch.stack([seed["blocks.0.mixer_norm.weight"] for seed in seeds]).double()
    assert torch.equal(found["blocks.0.mixer_norm.weight"], norms.mean(dim=0).float())


def test_attention_experts_are_as_wide_as_the_layer_that_they_are_made_of(dense, tmp_path):
    with pytest.raises(UserError, match=r"softmax.rope_theta: 10000.0, expected 500.0"):
        upcycle(dense[:1], recipe(attention_experts("each", "sequential", rope_theta=500.0)), tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("router", ["learned", "norm"])
@pytest.mark.parametrize("active", [6, 3])
def test_with_all_heads_read_a_mixture_of_heads_computes_what_its_source_does(dense, tmp_path, router, active):
    config = hybrid(heads=HeadMixtureConfig(mixers=("softmax",), active=active, router=router))
    notes, _ = made(dense[:1], tmp_path / "out", config)
    assert notes == ["Active heads initially have weight 1; inactive heads do not contribute to the output."]
    text = tokens(23)
    expected = model_of(dense[0], hybrid())(text, LAYOUT)
    difference = (model_of(tmp_path / "out", config)(text, LAYOUT) - expected).norm() / expected.norm()
    assert difference <= 1e-10 if active == 6 else difference > 1e-3


# Memory


def test_tensors_are_made_one_by_one_and_experts_in_pieces(dense, tmp_path):
    """What is alive at one time is what is being written and what is being made."""
    alive, most = {}, []
    lookup = lazy_tensors._LazyPlanner.lookup_object

    def counted(self, index):
        most.append(sum(numbers for storage, numbers in alive.items() if not storage.expired()))
        tensor = lookup(self, index)
        alive[StorageWeakRef(tensor.untyped_storage())] = tensor.numel()
        return tensor

    matrix = 4 * 20 * 12
    with (
        patch.object(lazy_tensors._LazyPlanner, "lookup_object", counted),
        patch.object(module, "BUFFER_BYTES", 2 * matrix),
    ):
        _, found = made(dense, tmp_path / "out", routed(experts=7))
    assert len(most) == len(found) + 2 * (3 + 1)  # gate_up in 4 pieces, down, of half the size, in 2
    pieces = [tensor.numel() for name, tensor in found.items() if ".experts." not in name] + [2 * 20 * 12]
    assert max(most) == max(pieces)
    sources = [values(find_weights(path, HOW)) for path in dense]
    for expert in range(7):
        for matrix in ("gate_up", "down"):
            source = sources[expert % 3][f"blocks.2.ffn.{matrix}.weight"]
            assert torch.equal(found[f"blocks.2.ffn.experts.{matrix}"][expert], source)


# What stops it


def left_by(sources, out, error):
    """The error that ends it; nothing of it is left."""
    with pytest.raises(error) as caught:
        upcycle(sources, recipe(routed()), out)
    assert not list(out.parent.iterdir())
    return str(caught.value)


def test_a_full_disk_is_reported_and_nothing_is_left(dense, tmp_path):
    stream, opened = FileSystem.create_stream, []

    def full(self, path, mode):
        opened.extend([path] * (mode == "wb"))
        if len(opened) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stream(self, path, mode)

    with patch.object(FileSystem, "create_stream", full):
        told = left_by(dense[:1], tmp_path / "out", UserError)
    assert told.startswith(f"{tmp_path / 'out'}: cannot be written: No space left on device (")


def test_an_interrupt_is_an_interrupt_and_nothing_is_left(dense, tmp_path):
    with patch.object(module, "initial_value", side_effect=KeyboardInterrupt):
        left_by(dense[:1], tmp_path / "out", KeyboardInterrupt)


# Mistakes


def refused(sources, out, config):
    with pytest.raises(UserError) as caught:
        upcycle(sources, recipe(config), out)
    assert not out.exists()
    assert not list(out.parent.glob("*.partial*"))
    return str(caught.value)


def test_experts_of_another_width(dense, tmp_path):
    told = refused(dense[:1], tmp_path / "out", routed(hidden=12))
    assert f"12 is not the width of the feed-forwards of {dense[0]}, from which" in told
    assert "set model.moe.hidden=10" in told


def test_more_shared_experts_than_one(dense, tmp_path):
    assert "model.moe.shared: 2 shared experts" in refused(dense[:1], tmp_path / "out", routed(shared=2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": 18}, "dim: 12, expected 18"),
        ({"layers": "S", "lightning": None}, "layers: 'LS', expected 'S'; lightning: {'heads': 3"),
        ({"depth": 2}, "depth: 3, expected 2"),
        ({"norm_eps": 1e-6}, "norm_eps: 1e-05, expected 1e-06"),
    ],
    ids=["dim", "layers", "depth", "norm_eps"],
)
def test_a_model_of_another_shape_is_reported_by_every_difference(dense, tmp_path, changes, said):
    fields = {name: getattr(routed(), name) for name in routed().model_fields_set}
    config = type(routed())(**(fields | changes))
    assert said in refused(dense[:1], tmp_path / "out", config)


def test_a_dense_layer_of_another_width_is_reported_with_both_shapes(dense, tmp_path):
    fields = {name: getattr(routed(), name) for name in routed().model_fields_set}
    config = type(routed())(**(fields | {"swiglu": SwigluConfig(hidden=14)}))
    told = refused(dense[:1], tmp_path / "out", config)
    assert (
        "blocks.1.ffn.down.weight [12, 14] of the recipe's model cannot be initialised from blocks.1.ffn.down.weight"
        in told
    )
    assert f"[12, 10] of {dense[0]}" in told


def test_what_no_rule_covers_and_what_nothing_takes_are_reported_by_name_and_shape(dense, tmp_path):
    with patch.object(rules, "RULES", rules.RULES[1:]):
        told = refused(dense[:1], tmp_path / "out", routed())
    assert "blocks.0.ffn.experts.gate_up [4, 20, 12] of the recipe's model" in told
    assert f"blocks.2.ffn.down.weight [12, 10] of {dense[0]}: not used by the recipe's model" in told


def test_sources_that_differ_from_each_other(dense, tmp_path):
    other = save(tmp_path / "other", 0, hybrid(swiglu=SwigluConfig(hidden=14)))
    told = refused([dense[0], other], tmp_path / "out", routed())
    assert f"{other} differs from {dense[0]}: swiglu.hidden: 14, expected 10" in told


def test_another_vocabulary(dense, tmp_path):
    fields = {name: getattr(routed(), name) for name in routed().model_fields_set}
    told = refused(dense[:1], tmp_path / "out", type(routed())(**fields, vocab_size=64))
    assert f"model.vocab_size: 64 in the recipe, but {dense[0]} has 29" in told


def test_a_recipe_without_routing_and_a_source_with_it(dense, tmp_path):
    assert "is dense, like its sources" in refused(dense[:1], tmp_path / "out", hybrid())
    upcycle(dense[:1], recipe(routed()), tmp_path / "routed")
    told = refused([tmp_path / "routed"], tmp_path / "out", routed(experts=8))
    assert f"{tmp_path / 'routed'} is already routed" in told


def test_what_is_there_is_not_replaced(dense, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out already exists: choose another --out"):
        upcycle(dense[:1], recipe(routed()), tmp_path / "out")


def test_a_source_that_cannot_be_read_leaves_nothing(dense, tmp_path):
    source = shutil.copytree(dense[0], tmp_path / "source")
    largest = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"\0" * largest.stat().st_size)
    assert f"{source} is damaged: {largest.name} has" in refused([source], tmp_path / "out", routed())

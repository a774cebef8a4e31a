"""`longctx convert`: its arguments, what it says, and its exit status."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from longctx.checkpoint.weights import find_weights
from longctx.launch.convert import split_arguments
from longctx.launch.main import app
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.config import ModelConfig
from longctx.model.ffn import SwigluConfig
from tests.convert.cases import save

RECIPE = """
name = "routed"
[model]
layers = "LS"
depth = 3
dim = 12
ffn = ["moe", "swiglu"]
lightning.heads = 3
softmax = { heads = 6, kv_heads = 2, head_dim = 4 }
swiglu.hidden = 10
moe = { experts = 4, active = 2, hidden = 10 }
[data]
path = "nowhere"
sequence_length = 64
[train]
steps = 4
[checkpoint]
every = 2
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A recipe, and two dense models `a` and `b`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routed.toml").write_text(RECIPE)
    for seed, name in enumerate("ab"):
        save(tmp_path / name, seed)
    return tmp_path


def convert(*arguments):
    """Exit status, stdout and stderr."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def run(*arguments):
    return convert("upcycle", *arguments)


def test_sources_and_overrides_are_reported_separately():
    arguments = ["runs/a", "model.moe.experts=8", "./b=c", "step-1", "seed=3", "model.moe={experts = 2}"]
    sources, overrides = split_arguments(arguments)
    assert sources == [Path("runs/a"), Path("b=c"), Path("step-1")]
    assert overrides == ["model.moe.experts=8", "seed=3", "model.moe={experts = 2}"]


def test_it_says_what_was_made_and_how_to_begin_with_it(place):
    status, out, said = run("a", "--to", "routed.toml", "model.moe.experts=6", "--out", "made/weights")
    assert (status, out) == (0, "")
    shapes = find_weights(place / "made/weights", "").shapes
    assert shapes["blocks.0.ffn.experts.down"] == (6, 12, 10)
    assert said.splitlines() == [
        f"made/weights: {sum(shape.numel() for shape in shapes.values()):,} parameters, upcycled from a",
        "The initial output equals the source's.",
        "To start a run from it: train.init=made/weights",
    ]


def test_it_says_what_changes_the_output(place):
    status, _, said = run("a", "b", "--to", "routed.toml", "--out", "weights", "model.moe.normalize=false")
    assert status == 0
    assert said.splitlines()[1:3] == [
        "The initial output differs from the source's: model.moe.normalize = false, so that a token's weights do not "
        "sum to 1.",
        "Experts come from several sources, other tensors are means: the initial output equals no source's.",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "error: a already exists: choose another --out"),
        (["gone", "--out", "x"], "error: gone: no such directory. Use weights as SOURCE: a checkpoint"),
        (["seed=3", "--out", "x"], "error: no SOURCE: name at least one"),
        (["a", "--out", "x", "model.moe.hidden=12"], "from which experts are copied: set model.moe.hidden=10"),
        (["a", "--out", "x", "model.depht=4"], "model.depht"),
    ],
)
def test_mistakes_end_with_their_message_and_status_2(place, arguments, said):
    status, out, told = run(*(["--out", "a"] if "--out" not in arguments else []), "--to", "routed.toml", *arguments)
    assert (status, out) == (2, "")
    assert said in told
    assert not (place / "x").exists()


# Models of transformers

SOFTMAX = SoftmaxConfig(heads=6, kv_heads=2, head_dim=4)
LLAMA = ModelConfig(layers="S", depth=2, dim=12, softmax=SOFTMAX, swiglu=SwigluConfig(hidden=10))


def test_a_model_goes_to_transformers_files_and_comes_back(place):
    save(place / "llama", 0, LLAMA)
    count = sum(shape.numel() for shape in find_weights(place / "llama", "").shapes.values())
    status, out, said = convert("to-huggingface", "llama", "--out", "theirs", "--shard-size", "3kB", "--dtype", "bf16")
    assert (status, out) == (0, "")
    files = len(list((place / "theirs").glob("*.safetensors")))
    assert said == f"theirs: {count:,} parameters of llama, as a llama model in {files} files\n"
    (place / "theirs/tokenizer.json").write_text("{}")
    status, out, said = convert("from-huggingface", "theirs", "--out", "again")
    assert (status, out) == (0, "")
    assert said.splitlines() == [
        f"again: {count:,} parameters of a llama model, from {files} files in theirs",
        'To start a run from it: extends = "again/model.toml" in a recipe, and train.init=again',
        "To prepare text with its tokenizer: longctx data prepare INPUT --tokenizer theirs/tokenizer.json --out DIR",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["from-huggingface", "a", "--out", "x"], "error: a has no config.json: use the folder of a model"),
        (["from-huggingface", "a", "b", "--out", "x"], "error: give one SOURCE, the folder of a model, not 2"),
        (["to-huggingface", "a", "--out", "x"], "error: a: no model of transformers has layers LS (model.layers)"),
        (["to-huggingface", "gone", "--out", "x"], "error: gone: no such directory. Use weights as SOURCE"),
        (["to-huggingface", "a", "--out", "x", "--shard-size", "many"], "error: --shard-size: 'many' is not an int"),
        (["to-huggingface", "a", "--out", "x", "--shard-size", "0"], "error: --shard-size 0: expected at least 1"),
    ],
)
def test_mistakes_of_the_other_conversions(place, arguments, said):
    status, out, told = convert(*arguments)
    assert (status, out) == (2, "")
    assert said in told
    assert not (place / "x").exists()

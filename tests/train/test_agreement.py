"""Agreement of the ranks: each difference in recipe, versions and run directory is named with its ranks and values."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longctx.errors import UserError
from longctx.recipe import load
from longctx.train.agreement import check_agreement, described, differences
from tests.train.runs import RECIPE


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return load(tmp_path / "tiny.toml")


def test_every_key_of_the_recipe_is_compared_but_what_is_compared_by_content(recipe):
    found = described(recipe, Path("runs/a"))
    assert {
        "seed",
        "model.dim",
        "model.lightning.heads",
        "optimizer.betas",
        "parallel.cp",
        "train.steps",
    } < found.keys()
    assert not {"data.path", "train.init"} & found.keys()
    assert found["data.mix"] == []
    assert found["stage"] == []
    assert found["--out"] == "runs/a"
    assert found["the version of torch"] == torch.__version__


def test_values_are_named_with_their_ranks():
    each = [{"lr": 1.0, "a": None, "same": 3}] * 3 + [{"lr": 2.0, "a": None, "same": 3}] + [{"lr": 1.0, "same": 3}] * 2
    assert differences(each) == ["lr: 1.0 on ranks 0-2, 4-5, 2.0 on rank 3"]
    assert differences([{"a": 1}, {"b": None}, {"a": 1}]) == ["a: 1 on ranks 0, 2, none on rank 1"]
    assert differences([{"a": 1}] * 4) == []


def on_rank(source, keys):
    """What a rank hears whose recipe has other values of `keys` where its number is odd."""
    overrides = [f"{key}={value}" for key, value in keys] if dist.get_rank() % 2 else []
    try:
        check_agreement(load(source, overrides), Path("out"))
    except UserError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize("size", [1, 4])
def test_equal_ranks_agree(ranks, recipe, tmp_path, size):
    assert ranks.run(on_rank, tmp_path / "tiny.toml", [], size=size) == ["agreed"] * size
    assert ranks.run(on_rank, tmp_path / "tiny.toml", [("data.path", "'elsewhere'")], size=size) == ["agreed"] * size


def test_corpora_of_a_mix_may_be_elsewhere_and_their_weights_may_not_differ(ranks, tmp_path):
    mix = '[[data.mix]]\npath = "a"\nweight = 1.0\n[[data.mix]]\npath = "b"\nweight = 2.0\n'
    (tmp_path / "tiny.toml").write_text(RECIPE.replace('path = "corpus"\n', "") + mix)
    elsewhere = '[{path="there",weight=1.0},{path="too",weight=2.0}]'
    assert ranks.run(on_rank, tmp_path / "tiny.toml", [("data.mix", elsewhere)], size=2) == ["agreed"] * 2
    told = ranks.run(on_rank, tmp_path / "tiny.toml", [("data.mix", elsewhere.replace("2.0", "3.0"))], size=2)
    assert "data.mix: " in told[0]
    assert '"weight": 3.0' in told[1]


def test_corpora_of_a_stage_may_be_elsewhere(tmp_path):
    found = []
    for path in ("a", "b"):
        stages = f'[[stage]]\nname = "one"\ndata.path = "{path}"\n[[stage]]\nname = "two"\n'
        mix = f'[[stage.data.mix]]\npath = "{path}"\nweight = 1.0\n'
        (tmp_path / "tiny.toml").write_text(RECIPE + stages + mix)
        found.append(described(load(tmp_path / "tiny.toml"), Path("out")))
    assert found[0] == found[1]
    assert found[0]["stage"][1]["data"] == {"mix": [{"weight": 1.0}]}


def test_all_ranks_hear_of_the_first_differences(ranks, recipe, tmp_path):
    keys = [("seed", 4), ("model.dim", 32), ("optimizer.lr", 0.1), ("train.steps", 9), ("optimizer.eps", 0.1)]
    keys += [("checkpoint.every", 7), ("checkpoint.keep", 9), ("logging.every", 3), ("optimizer.weight_decay", 0.5)]
    told = ranks.run(on_rank, tmp_path / "tiny.toml", keys, size=4)
    assert len(set(told)) == 1
    assert "seed: 3 on ranks 0, 2, 4 on ranks 1, 3; model.dim: 16 on ranks 0, 2, 32 on ranks 1, 3; " in told[0]
    assert told[0].endswith(" and 1 more")

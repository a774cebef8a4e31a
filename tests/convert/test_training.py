"""From a trained dense model to one with experts that is trained on, its experts divided over ranks; from the files of
transformers to a run and back."""

from pathlib import Path

import pytest
import torch

from longctx.checkpoint.weights import find_weights
from longctx.convert.huggingface import RECIPE, from_huggingface, to_huggingface
from longctx.convert.upcycle import upcycle
from longctx.recipe import load
from tests.combinations import mostly_slow, mostly_slow_rows
from tests.convert import cases
from tests.convert.models import like_minimax, like_qwen3_next
from tests.train import runs
from tests.train.runs import losses, train, write_workplace

EXPERTS = (
    'model.ffn=["moe", "swiglu"]',
    "model.moe={experts = 4, active = 2, hidden = 64, bias_rate = 1e-3, z = 1e-3}",
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def dense(ranks, workplace) -> list[Path]:
    """Two runs, of 4 and 2 steps, of different seeds."""
    runs = [workplace / f"dense-{seed}" for seed in (3, 4)]
    for seed, steps, run in zip((3, 4), (4, 2), runs, strict=True):
        ranks.run(train, workplace, run, [f"seed={seed}", f"train.steps={steps}"], size=2)
    return runs


@pytest.fixture(scope="module")
def continued(ranks, workplace, dense) -> Path:
    """The first one trained on, without experts."""
    ranks.run(train, workplace, workplace / "continued", ["train.steps=2", f"train.init={dense[0]}"], size=2)
    return workplace / "continued"


def converted(workplace, sources, out) -> Path:
    """`out`, made of `sources` as the command would."""
    upcycle(sources, load(workplace / "tiny.toml", EXPERTS), out)
    return out


@pytest.mark.parametrize(
    ("size", "overrides"),
    mostly_slow_rows(
        [(2, ["parallel.ep=2"]), (2, ["parallel.cp=1"]), (1, ["parallel.cp=1"])],
        lambda size, overrides: overrides == ["parallel.ep=2"],
    ),
    ids=["ep 2", "dp 2", "1 rank"],
)
def test_the_first_step_is_the_dense_models_and_training_continues(
    ranks, workplace, dense, continued, tmp_path, size, overrides
):
    """With the experts divided, sharded by rows, and whole."""
    out = converted(workplace, dense[:1], tmp_path / "weights")
    common = ["train.steps=4", "schedule.warmup=0", f"train.init={out}"]
    ranks.run(train, workplace, tmp_path / "routed", [*EXPERTS, *common, *overrides], size=size)
    found = losses(tmp_path / "routed")
    assert found[0] == pytest.approx(losses(continued)[0], rel=1e-6)
    assert found[0] < losses(dense[0])[0] - 0.3
    assert found[-1] < found[0]


def test_of_two_models_it_runs(ranks, workplace, dense, tmp_path):
    out = converted(workplace, dense, tmp_path / "weights")
    options = [*EXPERTS, "train.steps=4", "schedule.warmup=0", f"train.init={out}", "parallel.ep=2"]
    ranks.run(train, workplace, tmp_path / "routed", options, size=2)
    assert losses(tmp_path / "routed")[-1] < losses(tmp_path / "routed")[0]


@pytest.mark.parametrize(
    "config", mostly_slow([like_qwen3_next(), like_minimax()], like_qwen3_next()), ids=["qwen3_next", "minimax"]
)
def test_of_a_model_of_transformers_a_run_starts_and_is_exported(ranks, workplace, tmp_path, monkeypatch, config):
    monkeypatch.setattr(cases, "VOCABULARY", 320)
    cases.save(tmp_path / "built-in", 0, config)
    to_huggingface(tmp_path / "built-in", tmp_path / "theirs")
    from_huggingface(tmp_path / "theirs", tmp_path / "weights")
    (tmp_path / "corpus").symlink_to(workplace / "corpus")
    before, _, after = runs.RECIPE.partition("[model]")
    rest = after[after.index("[data]") :]
    (tmp_path / "tiny.toml").write_text(f'extends = "weights/{RECIPE}"\n{before}{rest}')
    options = ["train.steps=4", "schedule.warmup=0", f"train.init={tmp_path / 'weights'}"]
    ranks.run(train, tmp_path, tmp_path / "run", options, size=2)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    to_huggingface(tmp_path / "run", tmp_path / "trained")
    from_huggingface(tmp_path / "trained", tmp_path / "again")
    ran, again = (cases.values(find_weights(tmp_path / name, "")) for name in ("run", "again"))
    assert ran.keys() == again.keys()
    assert all(torch.equal(ran[name], again[name]) for name in ran)

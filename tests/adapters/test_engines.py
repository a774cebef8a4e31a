"""Fifty steps of a recipe have the same loss curve on the three engines, to float32 rounding."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")
pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")

from tests.adapters.engines import ALONE, OTHERS, run
from tests.train.runs import losses, write_workplace

RECIPE = ["train.steps=50", "checkpoint.every=50", "model.layers=LES", "model.depth=4", "model.gated_deltanet.heads=2"]
RECIPE += ["model.softmax.heads=4", "model.softmax.kv_heads=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_workplace(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def alone(ranks, place):
    return curve(ranks, place, ALONE)


def curve(ranks, place, engine):
    out = place / engine.name.replace(", ", "-").replace(" ", "")
    overrides = [f"data.path={place / 'corpus'}", *RECIPE]
    ranks.run(run, engine, place / "tiny.toml", out, overrides, size=engine.ranks)
    return losses(out)


@pytest.mark.parametrize("engine", OTHERS, ids=lambda engine: engine.name)
def test_the_curve_is_that_of_one_rank(ranks, place, alone, engine):
    found = curve(ranks, place, engine)
    assert found[0] > 1.2 * found[-1]
    assert found == pytest.approx(alone, rel=2e-5)

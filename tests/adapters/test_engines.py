"""Two dozen steps of a recipe have the same loss curve on the three engines, to float32 rounding."""

import pytest

pytest.importorskip("megatron.core", reason="needs the extra: pip install -e '.[megatron]'")
pytest.importorskip("deepspeed", reason="needs the extra: pip install -e '.[deepspeed]'")

from tests.adapters.engines import ALONE, OTHERS, run
from tests.train.runs import interrupted_copy, losses, write_workplace

RECIPE = ["train.steps=24", "checkpoint.every=24", "model.layers=LES", "model.depth=4", "model.gated_deltanet.heads=2"]
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


CURRICULUM = (
    'stage=[{ name = "short", data = { sequence_length = 32 }, train = { steps = 3 } }, '
    '{ name = "long", data = { sequence_length = 128 }, train = { steps = 3 }, '
    "model = { softmax = { rope_theta = 1e5 } } }]"
)


@pytest.mark.parametrize("engine", OTHERS[1::2], ids=lambda engine: engine.name)
def test_a_curriculum_is_that_of_one_rank_also_where_it_is_resumed_between_its_stages(ranks, place, engine, tmp_path):
    overrides = [f"data.path={place / 'corpus'}", *RECIPE, CURRICULUM, "checkpoint.every=2"]
    expected = place / "curriculum"
    if not expected.exists():
        ranks.run(run, ALONE, place / "tiny.toml", expected, overrides, size=1)
    ranks.run(run, engine, place / "tiny.toml", tmp_path / "whole", overrides, size=engine.ranks)
    assert losses(tmp_path / "whole") == pytest.approx(losses(expected), rel=2e-5)
    resumed = interrupted_copy(tmp_path / "whole", tmp_path / "resumed", 3)
    ranks.run(run, engine, place / "tiny.toml", resumed, overrides, "auto", size=engine.ranks)
    assert losses(resumed) == losses(tmp_path / "whole")

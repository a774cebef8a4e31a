"""Stages of a run: where it is by its latest checkpoint, and a curriculum on ranks."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from longctx.checkpoint.trainer_state import TrainerState
from longctx.errors import UserError
from longctx.recipe import Recipe, load
from longctx.train.stages import find_stage
from longctx.train.start import local_start, start_messages
from tests.combinations import mostly_slow
from tests.train.runs import RECIPE, checkpoints, interrupted_copy, losses, metrics, tensors, train, write_workplace

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints read by one process

PATH = Path("runs/a/checkpoints/step-00000003")
STAGES = 'stage=[{ name = "a", train = { steps = 3 } }, { name = "b", train = { steps = 2 } }]'


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    (tmp_path / "r.toml").write_text(RECIPE)
    return load(tmp_path / "r.toml", [STAGES, "schedule.warmup=0"])


def state(step: int, **stages: int) -> TrainerState:
    return TrainerState(step, 0, 0, "data", {}, stages=stages)


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (None, ("a", False)),
        (state(1, a=0), ("a", False)),
        (state(3, a=0), ("b", True)),
        (state(4, a=0), ("b", True)),  # the recipe had more steps then
        (state(4, a=0, b=3), ("b", False)),
        (state(5, a=0, b=3), ("b", False)),  # complete, and so is the run
    ],
)
def test_the_stage_that_comes_next(recipe, saved, expected):
    stage, begins = find_stage(recipe, PATH, saved)
    assert (stage.name, begins) == expected


def test_only_one_stage(recipe):
    assert find_stage(recipe, PATH, state(1, a=0), "a")[0].name == "a"
    assert find_stage(recipe, PATH, state(3, a=0), "b")[1]
    # A later one, since this one is complete.
    assert find_stage(recipe, PATH, state(4, a=0, b=3), "a")[0].name == "b"


@pytest.mark.parametrize(("saved", "step"), [(None, 0), (state(2, a=0), 2)])
def test_a_stage_before_another_is_complete(recipe, saved, step):
    with pytest.raises(UserError, match=rf"--stage b: stage a \(1 of 2\) comes first, and is at step {step} of 3"):
        find_stage(recipe, PATH, saved, "b")


def test_a_checkpoint_of_another_curriculum(recipe, tmp_path):
    with pytest.raises(UserError, match="is of the stage 'c', and the recipe has the stages a, b: restore"):
        find_stage(recipe, PATH, state(1, c=0))
    with pytest.raises(UserError, match="is of a run without stages, and the recipe has the stages a, b"):
        find_stage(recipe, PATH, state(1))
    with pytest.raises(UserError, match="is of the stage 'a', and the recipe has no stages"):
        find_stage(load(tmp_path / "r.toml"), PATH, state(1, a=0))


# A curriculum on ranks


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


CURRICULUM = (
    'stage=[{ name = "short", data = { sequence_length = 32 }, train = { steps = 3 }, parallel = { cp = 1 } }, '
    '{ name = "middle", train = { steps = 4 }, model = { softmax = { rope_theta = 2e4 } } }, '
    '{ name = "long", data = { sequence_length = 256 }, train = { steps = 3, sequences_per_step = 1 }, seed = 9, '
    'reset_optimizer = true, parallel = { layout = "contiguous" } }]'
)
OPTIONS = [CURRICULUM, "parallel.attention=ring", "evaluation.every=3", "checkpoint.keep=2"]


@pytest.fixture(scope="module")
def curriculum(ranks, workplace) -> Path:
    """3 + 4 + 3 steps in three stages on 2 ranks, uninterrupted."""
    assert ranks.run(train, workplace, workplace / "curriculum", [*OPTIONS, "checkpoint.keep=9"], size=2) == [0, 0]
    return workplace / "curriculum"


def test_stages_are_one_run(curriculum):
    found = metrics(curriculum)
    assert [step.step for step in found.steps] == list(range(1, 11))
    assert [(run.stage, run.step, run.sequence_length) for run in found.runs] == [
        ("short", 0, 32),
        ("middle", 3, 64),
        ("long", 7, 256),
    ]
    assert [run.mesh["cp"] for run in found.runs] == [1, 2, 2]
    assert found.steps[-1].tokens == 3 * 2 * 32 + 4 * 2 * 64 + 3 * 256
    # The schedule's warmup of 2 steps begins anew in each stage.
    peak = max(step.lr for step in found.steps)
    assert [step.lr / peak for step in found.steps if step.step in (1, 4, 8)] == pytest.approx([0.5] * 3)
    assert [evaluation.step for evaluation in found.evaluations] == [3, 6, 7, 9, 10]


def test_the_last_checkpoint_of_each_stage_is_kept(ranks, workplace, tmp_path):
    ranks.run(train, workplace, tmp_path, [*OPTIONS, "evaluation.sequences=2"], size=2)
    assert checkpoints(tmp_path) == [f"step-{step:08d}" for step in (3, 7, 8, 10)]


def test_a_start_says_what_it_begins_with_and_what_it_changes(workplace, curriculum):
    recipe = load(workplace / "tiny.toml", [f"data.path={workplace / 'corpus'}", *OPTIONS])
    saved = curriculum / "checkpoints" / "step-00000003"
    assert start_messages(local_start(recipe, workplace / "none", str(saved)))[:2] == [
        f"After step 3, stage middle (2 of 3) begins with {saved}.",
        "Changed: model.softmax.rope_theta: 10000 → 20000",
    ]
    saved = curriculum / "checkpoints" / "step-00000007"
    begins = start_messages(local_start(recipe, workplace / "none", str(saved)))[0]
    assert begins == f"After step 7, stage long (3 of 3) begins with {saved} and new optimizer states."


@pytest.mark.parametrize("step", mostly_slow([2, 3, 6, 7, 8], 6, 7))
def test_a_curriculum_that_is_killed_in_any_stage_ends_with_the_same_checkpoint(
    ranks, curriculum, workplace, tmp_path, step
):
    out = interrupted_copy(curriculum, tmp_path / "out", step)
    ranks.run(train, workplace, out, [*OPTIONS, "checkpoint.keep=9"], size=2)
    found, expected = metrics(out), metrics(curriculum)
    for name in ("step", "loss", "lr", "grad_norm", "tokens"):
        assert [getattr(step, name) for step in found.steps] == [getattr(step, name) for step in expected.steps]
    there = tensors(curriculum / "checkpoints" / "step-00000010")
    for name, tensor in tensors(out / "checkpoints" / "step-00000010").items():
        assert torch.equal(tensor, there[name]), name


def test_stages_one_at_a_time_are_the_whole_curriculum(ranks, curriculum, workplace, tmp_path):
    out, ends = tmp_path / "out", []
    for stage in ("short", "middle", "long"):
        ranks.run(train, workplace, out, [*OPTIONS, "checkpoint.keep=9"], "auto", nullcontext, False, stage, size=2)
        ends.append(len(metrics(out).steps))
    assert ends == [3, 7, 10]
    assert losses(out) == losses(curriculum)


def test_a_stage_begins_with_moments_or_without(ranks, curriculum, workplace, tmp_path):
    """The one with new optimizer states has taken its first step like a run that starts from the same weights."""
    weights = curriculum / "checkpoints" / "step-00000007"
    long = ["data.sequence_length=256", "seed=9", "model.softmax.rope_theta=1e4", "parallel.layout=contiguous"]
    options = [*long, "parallel.attention=ring", f"train.init={weights}", "train.steps=3", "train.sequences_per_step=1"]
    ranks.run(train, workplace, tmp_path / "anew", options, size=2)
    assert losses(tmp_path / "anew") == losses(curriculum)[7:]
    ranks.run(train, workplace, tmp_path / "kept", [*options, "train.init_optimizer=true"], size=2)
    kept = losses(tmp_path / "kept")
    assert kept[0] == losses(curriculum)[7]
    assert kept[1] != losses(curriculum)[8]

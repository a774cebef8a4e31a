"""Checkpoints that a run keeps beside the latest ones: milestones, and the best by its held-out loss."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from longctx.checkpoint.retention import RetentionPolicy
from longctx.recipe import load
from longctx.recipe.tables import CheckpointConfig
from longctx.train import trainer
from longctx.train.kept_checkpoints import best_text, build_retention, unknown_best_warning
from tests.train.runs import checkpoints, metrics, train, write_workplace

WORSE = ("optimizer.lr=10", "schedule.warmup=0", "schedule.kind=constant", "train.steps=12")
"""From step 5 on the held-out loss rises."""
ONE_RANK = ("parallel.cp=1",)
"""Where ranks would repeat each other."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


@contextmanager
def messages() -> Iterator[list[str]]:
    """What the run says to its user."""
    told: list[str] = []
    with patch.object(trainer.Reporter, "message", lambda self, text: told.append(text)):
        yield told


# By the recipe


def test_the_best_is_kept_where_there_is_an_evaluation_unless_told_otherwise():
    assert build_retention(CheckpointConfig(every=5), None, {}) == RetentionPolicy(2)
    assert build_retention(CheckpointConfig(every=5), 8, {}) == RetentionPolicy(2, sequences=8)
    assert build_retention(CheckpointConfig(every=5, keep_best=True), 8, {}) == RetentionPolicy(2, sequences=8)
    assert build_retention(CheckpointConfig(every=5, keep_best=False), 8, {}) == RetentionPolicy(2)
    assert build_retention(CheckpointConfig(every=5, keep=3, keep_every=10), None, {}) == RetentionPolicy(3, every=10)
    stages = {"short": 0, "middle": 6, "long": 9}
    expected = RetentionPolicy(2, sequences=8, stage="long", stage_ends=frozenset({6, 9}))
    assert build_retention(CheckpointConfig(every=5), 8, stages) == expected


@pytest.mark.parametrize(
    ("evaluation", "every", "steps", "extra", "warns"),
    [
        (100, 100, 400, [], False),
        (100, 150, 400, [], False),  # at step 300
        (100, 150, 300, [], True),
        (100, 30, 250, [], True),
        (100, 30, 250, ["checkpoint.keep_best=false"], False),
        (100, 300, 250, [], False),  # there is one checkpoint, the last one
        (None, 30, 250, [], False),
    ],
)
def test_evaluations_at_steps_without_a_checkpoint_are_pointed_out(workplace, evaluation, every, steps, extra, warns):
    overrides = [f"checkpoint.every={every}", f"train.steps={steps}", *extra]
    overrides += [f"evaluation.every={evaluation}"] if evaluation else []
    warning = unknown_best_warning(load(workplace / "tiny.toml", overrides))
    assert (warning is not None) is warns
    if warning is not None:
        assert warning.endswith(f"checkpoint.every = {every} and evaluation.every = 100 a multiple of the other")


def test_the_best_is_named_with_its_loss():
    assert best_text(None) == ""
    assert best_text((Path("a/step-1"), 2.34567)) == "\nBest held-out loss: 2.3457 nats per token, of a/step-1"


# Runs


@pytest.fixture(scope="module")
def good(ranks, workplace) -> Path:
    """Four good steps, with evaluations and checkpoints at steps 2 and 4."""
    overrides = ["train.steps=4", "evaluation.every=2", "checkpoint.keep=1"]
    ranks.run(train, workplace, workplace / "good", overrides, size=2)
    return workplace / "good"


def test_a_checkpoint_has_the_held_out_loss_of_its_own_parameters(ranks, workplace, tmp_path):
    overrides = ["train.steps=7", "evaluation.every=3", *ONE_RANK]
    (told,) = ranks.run(train, workplace, tmp_path / "out", overrides, "auto", messages, size=1)
    states = [
        json.loads((tmp_path / "out" / "checkpoints" / name / "trainer.json").read_text())["state"]
        for name in checkpoints(tmp_path / "out")
    ]
    losses = {each.step: each.loss for each in metrics(tmp_path / "out").evaluations}
    assert list(losses) == [3, 6, 7]
    assert {state["step"]: state["heldout_loss"] and state["heldout_loss"]["loss"] for state in states} == {
        2: None,
        4: None,
        6: losses[6],
        7: losses[7],
    }
    assert not any("keep_best" in text for text in told)


def test_the_best_checkpoint_survives_a_resume_and_worse_ones_and_is_named_at_the_end(ranks, workplace, good, tmp_path):
    assert checkpoints(good) == ["step-00000004"]
    out = shutil.copytree(good, tmp_path / "out")
    overrides = ["evaluation.every=2", "checkpoint.keep=1", *WORSE]
    (told, _) = ranks.run(train, workplace, out, overrides, "auto", messages, size=2)
    found = {each.step: each.loss for each in metrics(out).evaluations}
    assert min(found, key=lambda step: found[step]) == 4
    assert checkpoints(out) == ["step-00000004", "step-00000012"]
    best = out / "checkpoints" / "step-00000004"
    assert f"Best held-out loss: {found[4]:.4f} nats per token, of {best}\n" in told[-1]
    assert told[-1].startswith(f"Done. Checkpoint: {out / 'checkpoints' / 'step-00000012'}\n")


@pytest.mark.parametrize("extra", ["checkpoint.keep_best=false", "evaluation.sequences=2"])
def test_without_a_best_only_the_latest_stay(ranks, workplace, good, tmp_path, extra):
    """None is wanted; or the evaluation is of other sequences than before, with which losses cannot be compared."""
    out = shutil.copytree(good, tmp_path / "out")
    overrides = ["evaluation.every=9", "checkpoint.keep=1", *WORSE, *ONE_RANK, extra]
    ranks.run(train, workplace, out, overrides, size=1)
    assert checkpoints(out) == ["step-00000012"]


def test_milestones_stay_beside_the_latest(ranks, workplace, tmp_path):
    overrides = ["train.steps=9", "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3"]
    ranks.run(train, workplace, tmp_path / "out", [*overrides, *ONE_RANK], size=1)
    assert checkpoints(tmp_path / "out") == [f"step-{step:08d}" for step in (3, 6, 8, 9)]


def test_evaluations_that_meet_no_checkpoint_are_pointed_out_at_the_start(ranks, workplace, tmp_path):
    overrides = ["train.steps=5", "evaluation.every=3", *ONE_RANK]
    (told,) = ranks.run(train, workplace, tmp_path / "out", overrides, "auto", messages, size=1)
    assert sum(text.startswith("checkpoint.keep_best: no checkpoint before the last one") for text in told) == 1

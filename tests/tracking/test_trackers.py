"""The trackers of a run: which are opened, with what, what a failure at the start does, and how they are closed."""

import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longctx.errors import UserError
from longctx.recipe import Recipe, load
from longctx.recipe.tables import LoggingConfig, MlflowConfig, WandbConfig
from longctx.tracking import trackers
from longctx.tracking.base import TrackedRun
from longctx.tracking.trackers import Trackers, check_installed
from tests.tracking.records import RUN, FakeTracker, evaluation, spike, step
from tests.train.runs import RECIPE

WANDB = ("logging.wandb.project=p",)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def loaded(*overrides: str) -> Recipe:
        (tmp_path / "tiny.toml").write_text(RECIPE)
        return load(tmp_path / "tiny.toml", overrides)

    return loaded


class Library:
    """Stands for `longctx.tracking.wandb`: what its tracker is opened with, and the trackers."""

    def __init__(self, run_id: str = "new") -> None:
        self.run_id = run_id
        self.error: Exception | None = None
        self.runs: list[TrackedRun] = []
        self.opened: list[FakeTracker] = []

    def __call__(self, config: WandbConfig, run: TrackedRun) -> FakeTracker:
        if self.error is not None:
            raise self.error
        self.runs.append(run)
        self.opened.append(FakeTracker(run.previous_id or self.run_id, where="https://there"))
        return self.opened[-1]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    module: Any = types.ModuleType("longctx.tracking.wandb")
    module.WandbTracker = Library()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.WandbTracker


# Which are installed


def spec(name: str, origin: str | None) -> importlib.machinery.ModuleSpec:
    return importlib.machinery.ModuleSpec(name, None, origin=origin)


@pytest.mark.parametrize("found", [None, spec("wandb", None)], ids=["nothing", "a folder of that name"])
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, found) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError) as caught:
        check_installed(LoggingConfig(wandb=WandbConfig()))
    assert str(caught.value) == (
        "logging.wandb: the library wandb is not installed. Install it with pip install -e '.[wandb]', or remove "
        "[logging.wandb] from the recipe"
    )
    with pytest.raises(UserError, match=r"\.\[mlflow\]"):
        check_installed(LoggingConfig(mlflow=MlflowConfig()))


def test_what_is_not_asked_for_need_not_be_installed(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(LoggingConfig())
    check_installed(LoggingConfig(wandb=WandbConfig(mode="disabled")))


def test_an_installed_library_is_not_imported(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec(name, "there.py"))
    before = set(sys.modules)
    check_installed(LoggingConfig(wandb=WandbConfig(), mlflow=MlflowConfig()))
    assert set(sys.modules) == before


# From the start to the end


def test_a_tracker_gets_the_recipe_and_every_record(recipe, library, tmp_path) -> None:
    told: list[str] = []
    chosen = recipe(*WANDB)
    opened = Trackers(chosen, tmp_path, 0, {"wandb": "of an attempt without a checkpoint"}, told.append)
    assert (opened.ids, told) == ({"wandb": "new"}, ["Weights & Biases: https://there"])
    for record in (RUN, step(1), evaluation(1), spike(1), step(20)):
        opened.write(record)
    opened.close(failed=False)
    assert library.runs == [TrackedRun("tiny", chosen.model_dump(mode="json"), tmp_path, 0, None)]
    assert library.opened[0].told == [RUN, 1, 1, 1, 20, "finished"]


def test_a_run_that_resumes_continues_by_its_id(recipe, library, tmp_path) -> None:
    opened = Trackers(recipe(*WANDB), tmp_path, 10, {"wandb": "old", "mlflow": "other"}, lambda text: None)
    opened.close(failed=False)
    assert (library.runs[0].previous_id, library.runs[0].after_step) == ("old", 10)
    assert opened.ids == {"wandb": "old", "mlflow": "other"}, "those of trackers that are not asked for are kept"


def test_a_tracker_that_has_lost_the_run_says_so(recipe, library, tmp_path, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Library, "__call__", lambda self, config, run: FakeTracker("new"))
    opened = Trackers(recipe(*WANDB), tmp_path, 10, {"wandb": "old"}, told.append)
    opened.close(failed=False)
    assert told == ["Weights & Biases has no run old any more: this is a new one."]
    assert opened.ids == {"wandb": "new"}


@pytest.mark.parametrize(
    ("last", "failed", "outcome"), [(20, False, "finished"), (7, False, "stopped"), (20, True, "failed")]
)
def test_the_outcome_is_that_of_the_run(recipe, library, tmp_path, last, failed, outcome) -> None:
    opened = Trackers(recipe(*WANDB), tmp_path, 0, {}, lambda text: None)
    opened.write(step(last))
    opened.close(failed)
    assert library.opened[0].told == [last, outcome]


def test_tensorboard_is_opened_where_it_is_asked_for(recipe, tmp_path) -> None:
    Trackers(recipe(), tmp_path / "without", 0, {}, lambda text: None).close(failed=False)
    assert not (tmp_path / "without").exists()
    opened = Trackers(recipe("logging.tensorboard=true"), tmp_path / "with", 0, {}, lambda text: None)
    opened.write(step(1))
    opened.close(failed=False)
    assert opened.ids == {}
    assert [path.name for path in (tmp_path / "with").iterdir()] == ["tensorboard"]


# Failures


def test_a_tracker_that_cannot_be_opened_is_an_error_at_a_fresh_start(recipe, library, tmp_path) -> None:
    library.error = ConnectionError("refused")
    with pytest.raises(UserError) as caught:
        Trackers(recipe(*WANDB, "logging.tensorboard=true"), tmp_path, 0, {}, lambda text: None)
    assert str(caught.value) == (
        "logging.wandb: Weights & Biases cannot be opened: ConnectionError: refused. Mend that, or remove "
        "[logging.wandb] from the recipe"
    )
    assert not [thread for thread in threading.enumerate() if thread.name == "TensorBoard"], "that one is closed"


def test_a_run_that_resumes_trains_without_a_tracker_that_cannot_be_opened(recipe, library, tmp_path) -> None:
    told: list[str] = []
    library.error = ConnectionError("refused")
    opened = Trackers(recipe(*WANDB), tmp_path, 10, {"wandb": "old"}, told.append)
    opened.write(step(11))
    opened.close(failed=False)
    assert told == [
        "WARNING: logging.wandb: Weights & Biases cannot be opened: ConnectionError: refused. Training goes on "
        "without it."
    ]
    assert opened.ids == {"wandb": "old"}, "the next start continues it"


def test_a_mistake_of_the_user_is_an_error_at_any_start(recipe, library, tmp_path) -> None:
    library.error = UserError("nobody is logged in")
    with pytest.raises(UserError, match=r"^nobody is logged in$"):
        Trackers(recipe(*WANDB), tmp_path, 10, {}, lambda text: None)


def test_a_failure_in_the_middle_is_told_by_the_next_record(recipe, library, tmp_path) -> None:
    told: list[str] = []
    opened = Trackers(recipe(*WANDB), tmp_path, 0, {}, told.append)
    library.opened[0].error = OSError("disk")
    opened.write(replace(step(1), steps=1))
    opened.close(failed=False)
    assert [text.partition(":")[0] for text in told] == ["Weights & Biases", "WARNING", "WARNING"]
    assert "Weights & Biases failed: OSError: disk" in told[1]


def test_all_trackers_are_opened_and_closed_within_half_the_timeout(recipe, library, tmp_path, monkeypatch) -> None:
    """Other ranks wait for rank 0."""
    told: list[str] = []
    monkeypatch.setattr(trackers, "_WAIT_OF_TIMEOUT", 0.001)
    opened = Trackers(recipe(*WANDB, "parallel.timeout=30s"), tmp_path, 0, {}, told.append)
    library.opened[0].gate.clear()
    opened.write(step(1))
    opened.close(failed=False)
    library.opened[0].gate.set()
    assert told[1:] == ["WARNING: Weights & Biases lacks 1 record of this start."]

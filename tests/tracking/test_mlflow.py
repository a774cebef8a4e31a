"""MLflow, with a stand-in for its library: what is asked of it. The real one: tests/adapters."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from longctx.recipe.tables import MlflowConfig
from tests.tracking.records import RUN, point, tracked


class Pair(NamedTuple):
    key: str
    value: str


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class MlflowException(Exception):  # noqa: N818 - MLflow's name
    def __init__(self, error_code: str) -> None:
        super().__init__(error_code)
        self.error_code = error_code


class FakeStore:
    """A server and its client, which is made with a URI."""

    def __init__(self) -> None:
        self.tracking_uri = ""
        self.experiments: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}

    def __call__(self, uri: str | None) -> "FakeStore":
        self.tracking_uri = uri or "sqlite:///own.db"
        return self

    def get_experiment_by_name(self, name: str) -> types.SimpleNamespace | None:
        return types.SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def create_run(self, experiment: str, run_name: str) -> types.SimpleNamespace:
        run_id = f"run-{len(self.runs)}"
        self.runs[run_id] = {"experiment": experiment, "name": run_name, "status": "RUNNING", "stage": "active"}
        self.runs[run_id] |= {"params": {}, "tags": {}, "metrics": []}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

    def get_run(self, run_id: str) -> types.SimpleNamespace:
        if run_id not in self.runs:
            raise MlflowException("RESOURCE_DOES_NOT_EXIST")
        run = self.runs[run_id]
        info = types.SimpleNamespace(run_id=run_id, lifecycle_stage=run["stage"])
        return types.SimpleNamespace(info=info, data=types.SimpleNamespace(params=dict(run["params"])))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, metrics=(), params=(), tags=()) -> None:
        assert len(metrics) <= 1000
        assert max(len(params), len(tags)) <= 100
        run = self.runs[run_id]
        assert not run["params"].keys() & dict(params).keys(), "a param cannot change"
        run["params"] |= dict(params)
        run["tags"] |= dict(tags)
        run["metrics"] += metrics


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    fake = FakeStore()
    names = {
        "mlflow": {"MlflowClient": fake},
        "mlflow.entities": {"Metric": Metric, "Param": Pair, "RunTag": Pair},
        "mlflow.exceptions": {"MlflowException": MlflowException},
    }
    for name, values in names.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "longctx.tracking.mlflow", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    yield fake
    sys.modules.pop("longctx.tracking.mlflow", None)


def opened(previous_id: str | None = None, config: MlflowConfig | None = None, **recipe: object) -> Any:
    module = importlib.import_module("longctx.tracking.mlflow")
    run = tracked(Path("out"), 0 if previous_id is None else 5, previous_id, **recipe)
    return module.MlflowTracker(config or MlflowConfig(), run)


def test_the_table_of_the_recipe_reaches_mlflow(store) -> None:
    tracker = opened(config=MlflowConfig(uri="https://m.example.org", experiment="e", name="n", tags={"team": "x"}))
    assert store.tracking_uri == "https://m.example.org"
    assert tracker.where == "run run-0 of https://m.example.org"
    run = store.runs[tracker.run_id]
    assert (run["experiment"], run["name"], run["tags"]) == ("e", "n", {"team": "x"})
    assert run["params"] == {"seed": "3", "optimizer.lr": "0.1"}
    opened(config=MlflowConfig(experiment="e"))
    assert store.experiments == ["e"], "an experiment is created once"


def test_what_the_recipe_leaves_out_is_mlflows_own_choice(store, monkeypatch) -> None:
    tracker = opened()
    assert store.runs[tracker.run_id]["experiment"] == "Default"
    assert store.runs[tracker.run_id]["name"] == "tiny"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    assert store.runs[opened().run_id]["experiment"] == "of the environment"


def test_a_password_of_the_environment_is_not_shown(store, monkeypatch) -> None:
    monkeypatch.setattr(
        FakeStore, "__call__", lambda self, uri: setattr(self, "tracking_uri", "pg://me:pw@db/m") or self
    )
    assert opened().where == "run run-0 of pg://***@db/m"


def test_a_resumed_run_goes_on_and_what_changed_is_a_tag(store) -> None:
    first = opened(optimizer={"lr": 0.1, "clip": 1.0}, window=None)
    first.close("stopped")
    assert store.runs["run-0"]["status"] == "KILLED"
    assert "window" not in store.runs["run-0"]["params"]
    second = opened(first.run_id, optimizer={"lr": 0.2, "clip": None}, extra=1)
    assert second.run_id == "run-0"
    assert store.runs["run-0"]["status"] == "RUNNING"
    assert store.runs["run-0"]["params"] == {"seed": "3", "optimizer.lr": "0.1", "optimizer.clip": "1.0", "extra": "1"}
    assert store.runs["run-0"]["tags"] == {"recipe.optimizer.lr": "0.2", "recipe.optimizer.clip": "None"}


@pytest.mark.parametrize("lost", ["another store", "deleted"])
def test_a_run_that_the_store_has_lost_is_a_new_one(store, lost) -> None:
    first = opened()
    if lost == "deleted":
        store.runs[first.run_id]["stage"] = "deleted"
    assert opened("elsewhere" if lost == "another store" else first.run_id).run_id == "run-1"


def test_a_store_that_does_not_answer_has_not_lost_a_run(store, monkeypatch) -> None:
    def fail(run_id: str) -> None:
        raise MlflowException("TEMPORARILY_UNAVAILABLE")

    monkeypatch.setattr(store, "get_run", fail)
    with pytest.raises(MlflowException):
        opened("elsewhere")


def test_points_are_sent_in_batches_with_their_times(store) -> None:
    tracker = opened()
    tracker.write([point(number, a=1.0, b=2.0) for number in range(1, 1001)])
    metrics = store.runs[tracker.run_id]["metrics"]
    assert len(metrics) == 2000
    assert metrics[:2] == [Metric("a", 1.0, 10**12 + 1000, 1), Metric("b", 2.0, 10**12 + 1000, 1)]


def test_many_keys_are_sent_in_batches(store) -> None:
    tracker = opened(many={str(number): number for number in range(250)})
    assert len(store.runs[tracker.run_id]["params"]) == 252


def test_constants_are_tags_whose_keys_mlflow_takes(store) -> None:
    tracker = opened()
    tracker.describe(RUN)
    tags = store.runs[tracker.run_id]["tags"]
    assert tags["run.device"] == "a processor"
    assert tags["run.attention"] == '{"layer 1, 3": "ring"}'
    assert not any("," in key for key in tags)


@pytest.mark.parametrize(("outcome", "status"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_the_outcome_is_the_runs_status(store, outcome, status) -> None:
    tracker = opened()
    tracker.close(outcome)
    assert store.runs[tracker.run_id]["status"] == status

"""MLflow in a database of its own, by its own library: what it holds after training, resuming, and breaking."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("mlflow", reason="needs the extra: pip install -e '.[mlflow]'")
pytest.importorskip("sqlalchemy", reason="needs the extra: pip install -e '.[mlflow]'")

from mlflow import MlflowClient

from longctx.recipe.tables import MlflowConfig
from longctx.tracking.mlflow import MlflowTracker
from longctx.tracking.scalars import scalars
from longctx.train.run_record import read_record
from tests.tracking.records import RUN, evaluation, point, spike, step, tracked
from tests.train.runs import checkpoints, interrupted_copy, losses, metrics, train, write_workplace


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    """All values of a metric with their steps, in the order of their times."""
    found = sorted(client.get_metric_history(run_id, name), key=lambda metric: metric.timestamp)
    return [(metric.step, metric.value) for metric in found]


def test_a_run_that_resumes_is_one_run_with_all_its_steps(ranks, tmp_path, uri) -> None:
    workplace = write_workplace(tmp_path)
    overrides = [f"logging.mlflow.uri={uri}", "logging.mlflow.experiment=tests", "parallel.timeout=240s"]
    ranks.run(train, workplace, tmp_path / "whole", [*overrides, "evaluation.every=4"], size=2)
    out = interrupted_copy(tmp_path / "whole", tmp_path / "out", step=4)
    ranks.run(train, workplace, out, [*overrides, "evaluation.every=4", "optimizer.lr=0.001"], size=2)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.run_id == read_record(out).trackers["mlflow"]
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.003"
    assert run.data.tags["recipe.optimizer.lr"] == "0.001"
    found = history(client, run.info.run_id, "train/loss")
    assert [number for number, _ in found] == [*range(1, 9), *range(5, 9)]
    assert [loss for _, loss in found] == [*losses(tmp_path / "whole"), *losses(out)[4:]]
    evaluations = [*metrics(tmp_path / "whole").evaluations, metrics(out).evaluations[-1]]
    assert history(client, run.info.run_id, "heldout/loss") == [(each.step, each.loss) for each in evaluations]


def test_mlflow_takes_every_name_and_number(tmp_path, uri) -> None:
    tracker = MlflowTracker(MlflowConfig(uri=uri), tracked(tmp_path))
    tracker.describe(RUN)
    names = {name: value for record in (step(1), evaluation(1), spike(1)) for name, value in scalars(record).items()}
    tracker.write([point(1, **names), point(2, **{"train/loss": float("nan")})])
    tracker.close("failed")
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert names.keys() <= run.data.metrics.keys()
    assert run.data.tags["run.attention"] == '{"layer 1, 3": "ring"}'
    assert run.info.status == "FAILED"


def test_a_run_that_was_deleted_is_a_new_one(tmp_path, uri) -> None:
    first = MlflowTracker(MlflowConfig(uri=uri), tracked(tmp_path))
    again = MlflowTracker(MlflowConfig(uri=uri), tracked(tmp_path, 5, first.run_id))
    assert again.run_id == first.run_id
    MlflowClient(uri).delete_run(first.run_id)
    assert MlflowTracker(MlflowConfig(uri=uri), tracked(tmp_path, 5, first.run_id)).run_id != first.run_id
    elsewhere = f"sqlite:///{tmp_path}/other.db"
    assert MlflowTracker(MlflowConfig(uri=elsewhere), tracked(tmp_path, 5, first.run_id)).run_id != first.run_id


def train_while_the_store_breaks(workplace: Path, out: Path, uri: str) -> list[str]:
    """On a rank: train; from the third step on the database cannot be read. Returns the messages."""
    from longctx.train import trainer

    told: list[str] = []
    message, write = trainer.Reporter.message, MlflowTracker.write
    file = Path(uri.removeprefix("sqlite:///"))

    def kept(self: Any, text: str) -> None:
        told.append(text)
        message(self, text)

    def breaking(self: MlflowTracker, points: Any) -> None:
        if points[-1].step >= 3:
            file.write_bytes(b"no database" * 1000)
        write(self, points)

    overrides = [f"logging.mlflow.uri={uri}", "parallel.cp=1", "parallel.timeout=240s"]
    with patch.object(MlflowTracker, "write", breaking), patch.object(trainer.Reporter, "message", kept):
        assert train(workplace, out, overrides) == 0
    return told


def test_training_survives_a_store_that_breaks(ranks, tmp_path, uri) -> None:
    workplace = write_workplace(tmp_path)
    (told,) = ranks.run(train_while_the_store_breaks, workplace, tmp_path / "out", uri, size=1)
    assert [metric.step for metric in metrics(tmp_path / "out").steps] == list(range(1, 9))
    assert checkpoints(tmp_path / "out")[-1] == "step-00000008"
    failed, missing = [text for text in told if text.startswith("WARNING")]
    assert failed.startswith("WARNING: MLflow failed: ")
    assert missing.startswith("WARNING: MLflow lacks ")


def train_with_a_password(workplace: Path, out: Path, uri: str) -> object:
    with patch.dict(os.environ, {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_PASSWORD": "hunter2"}):
        return train(workplace, out, ["logging.mlflow.name=n", "parallel.cp=1", "train.steps=2"])


def test_secrets_of_the_environment_are_in_no_file(ranks, tmp_path, uri) -> None:
    workplace = write_workplace(tmp_path)
    ranks.run(train_with_a_password, workplace, tmp_path / "out", uri, size=1)
    files = [Path(uri.removeprefix("sqlite:///")), *(tmp_path / "out").rglob("*")]
    assert [file for file in files if file.is_file() and b"hunter2" in file.read_bytes()] == []
    assert len(MlflowClient(uri).search_runs(["0"])) == 1

"""MLflow, by its library `mlflow`.

A run that resumes continues the MLflow run of its id. Steps that are taken again are there twice: MLflow keeps all
values of a step, with their times.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from longctx.config import flattened, without_password
from longctx.engines.metrics import RunInfo
from longctx.recipe.tables import MlflowConfig
from longctx.tracking.base import Outcome, Point, TrackedRun

_METRICS, _PARAMS = 1000, 100
"""Metrics, and params or tags, that a server takes in one call."""
_TAG = 5000
"""Characters that every server takes in a tag."""
_STATUS: dict[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_Item = TypeVar("_Item")


class MlflowTracker:
    """One MLflow run. Its params are the resolved recipe.

    MLflow does not let a param change: where a resume comes with another value, that is the tag `recipe.KEY`.
    """

    advice = ""

    def __init__(self, config: MlflowConfig, run: TrackedRun) -> None:
        """Start an MLflow run, or continue that of `run.previous_id`, if the store still has it.

        Raises errors of mlflow if the store does not answer, or refuses.
        """
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # a new database is announced line by line
        self._client = MlflowClient(config.uri)
        self.run_id: str | None = run.previous_id if self._has(run.previous_id) else None
        if self.run_id is None:
            experiment = self._experiment(config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default"))
            self.run_id = self._client.create_run(experiment, run_name=config.name or run.name).info.run_id
        else:
            self._client.set_terminated(self.run_id, "RUNNING")
        self._id = self.run_id
        self._add_tags(config.tags)
        self._add_recipe(run.recipe)
        self.where = f"run {self._id} of {without_password(self._client.tracking_uri)}"

    def _has(self, run_id: str | None) -> bool:
        if run_id is None:
            return False
        try:
            return self._client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # another store than before
                return False
            raise

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def _add_tags(self, tags: Mapping[str, str]) -> None:
        for some in _parts([RunTag(key, value) for key, value in tags.items()], _PARAMS):
            self._client.log_batch(self._id, tags=some)

    def _add_recipe(self, recipe: Mapping[str, object]) -> None:
        known = self._client.get_run(self._id).data.params
        values = {key: str(value) for key, value in flattened(recipe) if value is not None or key in known}
        for some in _parts([Param(key, value) for key, value in values.items() if key not in known], _PARAMS):
            self._client.log_batch(self._id, params=some)
        changed = {key: value for key, value in values.items() if known.get(key, value) != value}
        self._add_tags({f"recipe.{key}": value for key, value in changed.items()})

    def describe(self, info: RunInfo) -> None:
        """Record the constants as tags, `run.KEY`."""
        # Tables as JSON: the names of layers, "layer 1, 3", are none that MLflow takes in a key.
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in asdict(info).items()}
        self._add_tags({f"run.{key}": text[:_TAG] for key, text in texts.items()})

    def write(self, points: Sequence[Point]) -> None:
        """Record points."""
        metrics = [
            Metric(name, value, int(1000 * point.time), point.step)
            for point in points
            for name, value in point.scalars.items()
        ]
        for some in _parts(metrics, _METRICS):
            self._client.log_batch(self._id, metrics=some)

    def close(self, outcome: Outcome) -> None:
        """Set the run's status: `FINISHED`, `KILLED` or `FAILED`."""
        self._client.set_terminated(self._id, _STATUS[outcome])


def _parts(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

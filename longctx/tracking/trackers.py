"""Trackers that a recipe's `[logging]` asks for: opened at the start, told of every record, closed at the end."""

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from longctx.engines.metrics import Record, RunInfo, StepMetrics
from longctx.errors import UserError
from longctx.recipe import Recipe
from longctx.recipe.tables import LoggingConfig
from longctx.tracking.background import BackgroundTracker, reason
from longctx.tracking.base import Outcome, Point, TrackedRun, Tracker
from longctx.tracking.scalars import scalars

_LONGEST_WAIT, _WAIT_AFTER_ERROR = 60.0, 5.0
_WAIT_OF_TIMEOUT = 0.5
"""Seconds, together, that trackers have to be opened and to be closed, at most so much of `parallel.timeout`."""


@dataclass(frozen=True)
class _Library:
    """A tracker that comes with an extra."""

    extra: str
    """The extra, the table of `[logging]`, and the module that is to be importable."""
    name: str
    tracker: str
    """The class in `longctx.tracking.<extra>`."""


_LIBRARIES = (_Library("wandb", "Weights & Biases", "WandbTracker"), _Library("mlflow", "MLflow", "MlflowTracker"))


def check_installed(config: LoggingConfig) -> None:
    """Raise UserError if a tracker that is asked for is not installed. Imports none."""
    for library, _ in _asked(config):
        found = importlib.util.find_spec(library.extra)
        # Without an origin it is any folder of that name, such as the one that wandb leaves in a working directory.
        if found is None or found.origin is None:
            raise UserError(
                f"logging.{library.extra}: the library {library.extra} is not installed. Install it with "
                f"pip install -e '.[{library.extra}]', or remove [logging.{library.extra}] from the recipe"
            )


def _asked(config: LoggingConfig) -> Iterator[tuple[_Library, Any]]:
    """Iterate over the libraries that are asked for, with their tables."""
    for library in _LIBRARIES:
        table = getattr(config, library.extra)
        if table is not None and getattr(table, "mode", None) != "disabled":
            yield library, table


class Trackers:
    """The trackers of one start of a run, on rank 0.

    A tracker that cannot be opened is a UserError at a fresh start. A run that resumes trains without it, after a
    warning: it was opened before, and nobody may be watching a job that was requeued.
    """

    def __init__(
        self, recipe: Recipe, out: Path, after_step: int, ids: dict[str, str], say: Callable[[str], None]
    ) -> None:
        """Open the trackers. `after_step`: the step from which the run resumes, 0 for a fresh start.

        `ids`: those of `self.ids` at an earlier start. `say` is called, in the calling thread of any method, with
        messages for the user.
        """
        self.ids = dict(ids) if after_step else {}
        """By which trackers continue the run at a later start, by the name of their table."""
        self._say = say
        self._patience = min(_LONGEST_WAIT, _WAIT_OF_TIMEOUT * recipe.parallel.timeout)
        self._opened_by = time.monotonic() + self._patience
        self._has_finished = False
        self._open: list[BackgroundTracker] = []
        run = TrackedRun(recipe.name, recipe.model_dump(mode="json"), out, after_step, None)
        try:
            if recipe.logging.tensorboard:
                module = import_module("longctx.tracking.tensorboard")
                self._add("TensorBoard", lambda: module.TensorBoardTracker(run))
            for library, table in _asked(recipe.logging):
                self._add_library(library, table, replace(run, previous_id=self.ids.get(library.extra)))
        except BaseException:
            self.close(failed=True)
            raise

    def _add(self, name: str, open_tracker: Callable[[], Tracker]) -> Tracker:
        # All of them together: the other ranks wait.
        background = BackgroundTracker(name, open_tracker, max(1.0, self._opened_by - time.monotonic()))
        self._open.append(background)
        return background.tracker

    def _add_library(self, library: _Library, table: Any, run: TrackedRun) -> None:
        try:
            # In this thread: an import takes as long as the disk does, and the server's time begins afterwards.
            module = import_module(f"longctx.tracking.{library.extra}")
            tracker = self._add(library.name, lambda: getattr(module, library.tracker)(table, run))
        except UserError:
            raise
        except Exception as error:  # each library raises its own
            text = f"logging.{library.extra}: {library.name} cannot be opened: {reason(error)}"
            if not run.after_step:
                raise UserError(f"{text}. Mend that, or remove [logging.{library.extra}] from the recipe") from error
            self._say(f"WARNING: {text}. Training goes on without it.")
            return
        if tracker.run_id is not None:
            if run.previous_id not in (None, tracker.run_id):
                self._say(f"{library.name} has no run {run.previous_id} any more: this is a new one.")
            self.ids[library.extra] = tracker.run_id
        if tracker.where:
            self._say(f"{library.name}: {tracker.where}")

    def write(self, record: Record) -> None:
        """Hand a record to every tracker. Returns at once."""
        for tracker in self._open:
            if isinstance(record, RunInfo):
                tracker.describe(record)
            else:
                tracker.write(Point(record.step, time.time(), scalars(record)))
        if isinstance(record, StepMetrics):
            self._has_finished = record.step >= record.steps
        self._tell()

    def close(self, failed: bool) -> None:
        """Close the trackers, and wait for them, though not for long. `failed`: whether an error ends the run."""
        outcome: Outcome = "failed" if failed else "finished" if self._has_finished else "stopped"
        # After an error the launcher kills ranks soon.
        end = time.monotonic() + (min(self._patience, _WAIT_AFTER_ERROR) if failed else self._patience)
        for tracker in self._open:
            tracker.ask_to_close(outcome)
        for tracker in self._open:
            tracker.wait_for_close(max(0.0, end - time.monotonic()))
        self._tell()
        self._open = []

    def _tell(self) -> None:
        for tracker in self._open:
            for message in tracker.take_messages():
                self._say(message)

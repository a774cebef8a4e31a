"""Weights & Biases, by its library `wandb`.

A run that resumes continues the W&B run of its id. W&B's own step counts calls and cannot go back, so it is not used:
the step is a metric, `step`, the x-axis of all others (`define_metric`). Steps that are taken again after a resume are
then there twice, at the same place, and none is refused. The other ways are worse: leaving out steps up to the latest
known would hide the new curve where a run went back to an earlier checkpoint with other settings, and W&B's rewind
(`resume_from`) works neither offline nor on every server. `metrics.jsonl` has each step once.
"""

import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import wandb

from longctx.engines.metrics import RunInfo
from longctx.errors import UserError
from longctx.recipe.tables import WandbConfig
from longctx.tracking.base import Outcome, Point, TrackedRun

STEP = "step"
_ANSWER = 45
"""Seconds that W&B's server has to answer at the start."""


class WandbTracker:
    """One W&B run. Offline it is in `wandb/` in the run's directory, for `wandb sync`."""

    def __init__(self, config: WandbConfig, run: TrackedRun) -> None:
        """Start a W&B run, or continue that of `run.previous_id`.

        Raises UserError if nobody is logged in, and errors of wandb if its server does not answer.
        """
        self.run_id: str | None = run.previous_id or uuid.uuid4().hex[:8]
        # wandb sets one that prints the traceback of errors which the launcher shows in one line.
        hook = sys.excepthook
        try:
            self._run = self._start(config, run)
        finally:
            sys.excepthook = hook
        self._run.config.update(run.recipe, allow_val_change=True)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self.advice = f"Upload it with: wandb sync {self._run.settings.sync_dir}"
        self.where = f"offline. {self.advice}" if self._run.offline else self._run.url or ""

    def _start(self, config: WandbConfig, run: TrackedRun) -> Any:
        # Neither wraps stdout, which belongs to the display, nor prints.
        chosen = {"mode": config.mode} if config.mode else {}
        settings = wandb.Settings(console="off", silent=True, init_timeout=_ANSWER, **chosen)
        mode = wandb.setup(settings=settings).settings.mode
        # `init` would ask for a key, where there is a terminal.
        if mode == "online" and not wandb.login(prompt=False):
            raise UserError(
                "logging.wandb: nobody is logged in to Weights & Biases. Run `wandb login`, set WANDB_API_KEY, or set "
                "logging.wandb.mode=offline and upload later with `wandb sync`"
            )
        return wandb.init(
            entity=config.entity,
            project=config.project,
            name=config.name or run.name,
            group=config.group,
            tags=list(config.tags) or None,
            id=self.run_id,
            resume="allow",
            dir=str(run.out),
            settings=settings,
        )

    def describe(self, info: RunInfo) -> None:
        """Record the constants as the table `run` of W&B's config, which has the recipe's tables."""
        self._run.config.update({"run": asdict(info)}, allow_val_change=True)

    def write(self, points: Sequence[Point]) -> None:
        """Record points."""
        for point in points:
            self._run.log({STEP: point.step, **point.scalars})

    def close(self, outcome: Outcome) -> None:
        """Upload what is left. The run is `finished`, `preempted` or `failed`."""
        if outcome == "stopped":
            self._run.mark_preempting()
        status = 0 if outcome == "finished" else 1
        self._run.finish(exit_code=status)
        # Offline, wandb's process still writes when that returns.
        wandb.teardown(exit_code=status)

"""TensorBoard event files in the run's directory."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from longctx.engines.metrics import RunInfo
from longctx.files import writing
from longctx.tracking.base import Outcome, Point, TrackedRun


class TensorBoardTracker:
    """Writes to `tensorboard/` in the run's directory. TensorBoard hides earlier points of the steps after a resume."""

    run_id, where, advice = None, "", ""

    def __init__(self, run: TrackedRun) -> None:
        """Open new event files. Raises UserError if they cannot be written."""
        # The import takes seconds: only runs that log to TensorBoard pay for it.
        from torch.utils.tensorboard import SummaryWriter

        folder = run.out / "tensorboard"
        purge = run.after_step + 1 if run.after_step else 0
        with writing(folder):
            self._board: Any = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def describe(self, info: RunInfo) -> None:
        """Record the constants as a table of text."""
        rows = "".join(f"| {key} | {value} |\n" for key, value in asdict(info).items())
        self._board.add_text("run", f"| | |\n|---|---|\n{rows}", info.step)

    def write(self, points: Sequence[Point]) -> None:
        """Record points."""
        for point in points:
            for name, value in point.scalars.items():
                self._board.add_scalar(name, value, point.step, walltime=point.time)

    def close(self, outcome: Outcome) -> None:
        """Flush and close the files."""
        self._board.close()

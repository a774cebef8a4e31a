"""Recovery of a run: how long it took from the last step before a stop or failure to the first one after the resume."""

from dataclasses import dataclass
from pathlib import Path

from longctx.engines.metrics import FILE_NAME, read_last_step
from longctx.train.display import human_duration


@dataclass(frozen=True)
class LastStep:
    """The last step that a run recorded before it ended."""

    number: int
    time: float
    """When, in seconds, by the clock of the file system that has the metrics."""


def find_last_step(out: Path) -> LastStep | None:
    """Return the last step in the metrics of the run in `out`; None if there is none.

    Raises UserError if the metrics cannot be read.
    """
    path = out / FILE_NAME
    last = read_last_step(path) if path.is_file() else None
    return None if last is None else LastStep(last.step, path.stat().st_mtime)


def recovery_text(last: LastStep, resumed_from: int, out: Path) -> str:
    """Return a line about the resume after the step `resumed_from`, whose first step is the latest line of metrics."""
    seconds = (out / FILE_NAME).stat().st_mtime - last.time
    repeated = max(0, last.number - resumed_from)
    steps = "step is" if repeated == 1 else "steps are"
    return f"Recovered {human_duration(seconds)} after the last step before; {repeated} {steps} repeated."

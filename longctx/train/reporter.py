"""Reporting of a run on rank 0: metrics, trackers, display, `run.json` and plots."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from longctx.engines.metrics import (
    FILE_NAME,
    EvaluationMetrics,
    MetricsWriter,
    Record,
    RunInfo,
    SpikeMetrics,
    StepMetrics,
)
from longctx.recipe import Recipe
from longctx.tracking.trackers import Trackers
from longctx.train import spikes
from longctx.train.display import Display, make_display
from longctx.train.recovery import find_last_step, recovery_text
from longctx.train.run_record import add_start, read_record
from longctx.train.start import Start


class Reporter:
    """Metrics, trackers, display and `run.json` on rank 0; a no-op on other ranks."""

    def __init__(self, recipe: Recipe, out: Path, start: Start, entry: Mapping[str, Any], *, active: bool) -> None:
        step = start.state.step
        self._out = out
        self._trackers: Trackers | None = None
        self._writer: MetricsWriter | None = None
        self._display: Display | None = None
        self._resumed_from, self._last = step, None
        if dist.get_rank() == 0:
            record = read_record(out)  # before metrics are replaced
            # A stage that begins follows the one before without a failure between them.
            self._last = find_last_step(out) if step and not start.begins_stage else None
            self._writer = MetricsWriter(out, after_step=step)
            self._display = make_display()
            if active:
                self._trackers = Trackers(recipe, out, step, record.trackers, self.message)
                add_start(out, record, entry, self._trackers.ids)

    def start(self, info: RunInfo) -> None:
        self._record(info)
        if self._display:
            self._display.start(info)

    def step(self, metrics: StepMetrics) -> None:
        self._record(metrics)
        if self._display:
            self._display.step(metrics)
            if self._last is not None:
                self.message(recovery_text(self._last, self._resumed_from, self._out))
                self._last = None

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        self._record(metrics)
        if self._display:
            self._display.evaluation(metrics)

    def spike(self, metrics: SpikeMetrics) -> None:
        text = spikes.message(metrics)
        self._record(metrics)
        if text is not None:
            self.message(text)

    def _record(self, record: Record) -> None:
        if self._writer:
            self._writer.write(record)
        if self._trackers:
            self._trackers.write(record)

    def message(self, text: str) -> None:
        if self._display:
            self._display.message(text)

    def end(self, text: str) -> None:
        """Print the run's last line, below the panel and the last step."""
        if self._display:
            self._display.close()
        self.message(text)

    def plot(self) -> None:
        if self._writer:
            # Imported here: matplotlib takes a second, which every rank would spend at the start.
            from longctx.train import plots

            plots.draw(self._out / FILE_NAME, self._out / "pictures")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trackers:
            self._trackers.close(failed=kind is not None)
        if self._writer and self._display:
            self._display.close()
            self._writer.close()

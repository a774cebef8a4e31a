"""Training display: a live panel in a terminal, plain log lines everywhere else."""

import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from statistics import fmean
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, SegmentLines
from rich.table import Table
from rich.text import Text

from longctx.engines.metrics import EvaluationMetrics, PositionLoss, RunInfo, StepMetrics
from longctx.printable import printable

_BARS = "▁▂▃▄▅▆▇█"
_MAX_WIDTH = 92  # columns of the panel: wider, labels and numbers are too far apart
_CHART_ROWS = 3
_SPARKS = 18  # bars of the sparkline
_HISTORY = 4 * _SPARKS  # losses in the sparkline: each bar averages several, or it would show only noise
_PLAIN_INTERVAL = 5.0  # seconds
_DAY, _LONGEST = 86_400.0, 86_400.0 * 3650  # seconds: an end between them has a date, a later one is no estimate


class Display(Protocol):
    """Shows a run. The trainer calls `start` once, then the others, and `close` at the end, also after an error.

    Messages after `close` are below all that was shown.
    """

    def start(self, info: RunInfo) -> None:
        """Show the run, the model and the machine, before the first step."""

    def step(self, metrics: StepMetrics) -> None:
        """Show a step."""

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Show an evaluation."""

    def message(self, text: str) -> None:
        """Print a persistent line, such as the path of a checkpoint."""

    def close(self) -> None:
        """Leave the last state on the screen. Idempotent."""


def make_display(console: Console | None = None) -> Display:
    """Make a live panel if `console` (default: stdout) is a terminal that can draw one, else plain lines."""
    console = console or Console()
    # FORCE_COLOR, which CI sets, makes is_terminal true without a terminal; and a terminal without UTF-8 cannot show
    # the bars.
    can_draw = console.is_interactive and console.file.isatty() and console.encoding.startswith("utf")
    return LiveDisplay(console) if can_draw else PlainDisplay(console)


class PlainDisplay:
    """Plain log lines: evaluations, messages, the first and last step, and at most one step per `interval` seconds."""

    def __init__(
        self,
        console: Console,
        interval: float = _PLAIN_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock
        self._now = now
        self._printed: float | None = None
        self._held_back: StepMetrics | None = None

    def start(self, info: RunInfo) -> None:
        """Print a line about the run and its model, and one about the machine."""
        self.message(f"{info.name}: {_model(info)} · {_lengths(info)} · {info.directory}")
        self.message(f"{_machine(info)} · {human_flops(info.matmul_rate)} matmul rate")

    def step(self, metrics: StepMetrics) -> None:
        """Print the step, or hold it back if the last line is too recent."""
        self._held_back = metrics
        due = self._printed is None or self._clock() - self._printed >= self._interval
        if due or metrics.step >= metrics.steps:
            self._print_step()

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Print the held-out loss, in total and at up to six positions."""
        self._print_step()  # an evaluation follows the step that it evaluates
        buckets = [bucket for bucket in metrics.positions if bucket.tokens]
        shown = buckets[:: max(1, math.ceil(len(buckets) / 5))]
        if buckets and shown[-1] is not buckets[-1]:
            shown.append(buckets[-1])
        by_position = "  ".join(f"{human_position(bucket.lo)}: {bucket.loss:.3f}" for bucket in shown)
        self.message(f"step {metrics.step}  held-out loss {metrics.loss:.4f}  from position {by_position}")

    def message(self, text: str) -> None:
        """Print a line."""
        # soft_wrap: log lines are not wrapped at 80 columns.
        self._console.print(printable(text, lines=True), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Print the last step if it was held back."""
        self._print_step()

    def _print_step(self) -> None:
        metrics, self._held_back = self._held_back, None
        if metrics is None:
            return
        self._printed = self._clock()
        self.message(
            f"step {metrics.step}/{metrics.steps}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
            f"grad norm {metrics.grad_norm:.3g}  {human_count(metrics.tokens_per_second)} tok/s  "
            f"{metrics.utilisation:.0%} MFU  {human_bytes(metrics.memory_bytes)}  {_load(metrics)}{_straggler(metrics)}"
            f"{_left(metrics.seconds_left, self._now)}"
        )


class LiveDisplay:
    """A panel at the bottom of the terminal; messages and other output scroll above it."""

    def __init__(
        self,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._console = console
        self._clock = clock
        self._now = now
        self._info: RunInfo | None = None
        self._last: StepMetrics | None = None
        self._last_at = self._started_at = clock()
        self._evaluation: EvaluationMetrics | None = None
        # Replaced, never mutated: the drawing thread reads it at any time.
        self._losses: tuple[float, ...] = ()
        self._closed = False
        self._drawn = (0, 0)  # columns and rows of the panel on the screen
        # Only twice per second: the cores are for training.
        self._live = Live(console=console, get_renderable=self._redraw, refresh_per_second=2)

    def start(self, info: RunInfo) -> None:
        """Open the panel."""
        self._info = info
        self._last_at = self._started_at = self._clock()
        self._live.start(refresh=True)

    def step(self, metrics: StepMetrics) -> None:
        """Record the step; it shows at the next refresh."""
        self._losses = (*self._losses, metrics.loss)[-_HISTORY:]
        self._last_at = self._clock()
        self._last = metrics

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Record the evaluation; it shows at the next refresh."""
        self._evaluation = metrics

    def message(self, text: str) -> None:
        """Print a line above the panel."""
        self._console.print(printable(text, lines=True), markup=False, highlight=False)

    def close(self) -> None:
        """Draw the panel a last time and leave it on the screen."""
        self._closed = True
        self._live.stop()

    def render(self, width: int, height: int) -> RenderableType:
        """Render the panel for a terminal of `width` columns and `height` rows; low terminals get no chart."""
        width = min(width, _MAX_WIDTH)
        inner = width - 4
        parts: list[RenderableType] = [self._progress(inner)]
        if self._info is not None:
            run = f"{_lengths(self._info)} · {self._info.directory}"
            parts.append(Text(printable(run), style="dim", no_wrap=True, overflow="ellipsis"))
        if self._last is not None:
            parts += [Text(), self._numbers(self._last, inner)]
        evaluation = self._evaluation
        if evaluation is not None and height >= 18:
            heading = f"held-out loss by position, step {evaluation.step}"
            parts += [Text(), Text(heading, style="dim", no_wrap=True), _position_chart(evaluation.positions, inner)]
        return Panel(
            Group(*parts),
            title=Text(f"longctx · {self._info.name} · {_model(self._info)}" if self._info else "longctx"),
            title_align="left",
            subtitle=Text(_machine(self._info)) if self._info else None,
            subtitle_align="right",
            width=width,
            border_style="cyan",
        )

    def _redraw(self) -> RenderableType:
        size = self._console.size
        columns, rows = self._drawn
        if size.width < columns:
            # A narrowed terminal has wrapped each row of the panel; rich would move up by the unwrapped count.
            wrapped = rows * (math.ceil(columns / size.width) - 1)
            up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * wrapped
            self._console.control(Control(*up))
        lines = self._console.render_lines(self.render(size.width, size.height), pad=False)
        self._drawn = (min(size.width, _MAX_WIDTH), min(len(lines), size.height))
        return SegmentLines(lines, new_lines=True)

    def _progress(self, width: int) -> RenderableType:
        last, waited = self._last, self._clock() - self._last_at
        if last is None:
            text = "stopped before the first step" if self._closed else f"first step, {int(waited)}s so far"
            done, total = 0, 1
        else:
            done, total = last.step, last.steps
            text = f"{done}/{total} steps · "
            if width >= 60:
                text += f"{human_count(last.tokens)} tokens · "
            if not self._closed:
                text += _left(last.seconds_left - waited, self._now if width >= 60 else None)
            else:
                verb = "done in" if done >= total else "stopped after"
                text += f"{verb} {human_duration(self._last_at - self._started_at)}"
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(ProgressBar(total=total, completed=done), Text(text, style="bold"))
        row.width = width
        return row

    def _numbers(self, last: StepMetrics, width: int) -> RenderableType:
        info, evaluation = self._info, self._evaluation
        loss = Text(f"{last.loss:.4f} ", style="bold" if math.isfinite(last.loss) else "bold red")
        loss.append(sparkline(self._losses, _SPARKS), style="cyan")
        held_out = f"{evaluation.loss:.4f} at step {evaluation.step}" if evaluation else "none yet"
        rate = f" of {human_flops(info.matmul_rate)}" if info else ""
        step_time = human_duration(last.seconds)
        if last.seconds >= 5 and not self._closed:
            step_time += f", now {human_duration(int(self._clock() - self._last_at))}"
        left: list[tuple[str, str | Text]] = [
            ("loss", loss),
            ("held-out", held_out),
            ("learning rate", f"{last.lr:.2e}"),
            ("grad norm", f"{last.grad_norm:.3g}"),
        ]
        right: list[tuple[str, str | Text]] = [
            ("speed", f"{human_count(last.tokens_per_second)} tok/s"),
            ("utilisation", f"{last.utilisation:.0%}{rate}"),
            ("memory", f"{human_bytes(last.memory_bytes)} peak"),
            ("step time", step_time),
        ]
        table = Table.grid(padding=(0, 1), expand=True)
        table.width = width
        if width < 64:
            table.add_column(style="dim", width=13, no_wrap=True)
            table.add_column(ratio=1, no_wrap=True)
            for pair in left + right:
                table.add_row(*pair)
        else:
            for label_width, ratio in ((13, 8), (11, 7)):
                table.add_column(style="dim", width=label_width, no_wrap=True)
                table.add_column(ratio=ratio, no_wrap=True)
            for one, other in zip(left, right, strict=True):
                table.add_row(*one, *other)
        if last.routers:
            table.add_row("max load", f"{_max_load(last):.2f} of the mean")
        if last.waits and last.waits.straggler is not None:
            table.add_row("waiting", f"{last.waits.median:.0%} for rank {last.waits.rank}")
        return table


def _model(info: RunInfo) -> str:
    return f"{human_count(info.parameters)} parameters, {info.precision}"


def _lengths(info: RunInfo) -> str:
    sequence, step = human_position(info.sequence_length), human_position(info.tokens_per_step)
    stage = f"stage {info.stage} ({info.stage_number + 1} of {info.stage_count}), " if info.stage else ""
    return f"{stage}sequences of {sequence} tokens, {step} tokens per step"


def _left(seconds: float, now: Callable[[], datetime] | None) -> str:
    """Format the time to the end, with its local date and time, by `now`, if that is more than a day away."""
    text = f"{human_duration(seconds)} left"
    if now is None or not _DAY <= seconds < _LONGEST:
        return text
    return f"{text} ({now() + timedelta(seconds=seconds):%Y-%m-%d %H:%M})"


def _max_load(metrics: StepMetrics) -> float:
    """Return the largest expert or head load over the mean load, maximum over layers."""
    return max(router.imbalance for router in metrics.routers.values())


def _load(metrics: StepMetrics) -> str:
    return f"max load {_max_load(metrics):.2f}  " if metrics.routers else ""


def _straggler(metrics: StepMetrics) -> str:
    waits = metrics.waits
    return f"{waits.median:.0%} waiting for rank {waits.rank}  " if waits and waits.straggler is not None else ""


def _machine(info: RunInfo) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in info.mesh.items() if size > 1)
    ranks = f"{info.ranks} rank{'s' if info.ranks != 1 else ''}" + (f" ({axes})" if axes else "")
    return f"{ranks} on {info.device}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw at most `width` bars, each the mean of consecutive values; "×" where it is not finite."""
    group = max(1, math.ceil(len(values) / width))
    values = [fmean(values[i : i + group]) for i in range(0, len(values), group)]
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(_BARS[_level(v, low, high, len(_BARS) - 1)] if math.isfinite(v) else "×" for v in values)


def _level(value: float, low: float, high: float, top: int) -> int:
    return round((value - low) / (high - low) * top) if high > low else 0


def _position_chart(positions: tuple[PositionLoss, ...], width: int) -> Text:
    """Draw a bar per position bucket, some labelled with position and loss."""
    buckets = [bucket for bucket in positions if bucket.tokens and math.isfinite(bucket.loss)]
    margin = len("from ")
    if not buckets or width - margin < len(buckets):
        return Text("none" if not buckets else "(terminal too narrow)", style="dim", no_wrap=True)
    cell = min(5, (width - margin) // len(buckets))
    low, high = min(b.loss for b in buckets), max(b.loss for b in buckets)
    levels = [1 + _level(bucket.loss, low, high, 8 * _CHART_ROWS - 1) for bucket in buckets]
    chart = Text(no_wrap=True)
    for row in reversed(range(_CHART_ROWS)):
        eighths = [min(8, max(0, level - 8 * row)) for level in levels]
        bars = "".join(((" " + _BARS)[n] * max(1, cell - 1)).ljust(cell) for n in eighths)
        chart.append(" " * margin + bars.rstrip() + "\n", style="cyan")
    stride = math.ceil(6 / cell)
    labels, losses = "from ", "loss "
    for bucket in buckets[::stride]:
        if len(labels) + 5 <= width:  # else the panel's edge would cut the number: "512Ki", "10.25"
            labels += human_position(bucket.lo).ljust(stride * cell)
            losses += f"{bucket.loss:.2f}".ljust(stride * cell)
    chart.append(labels.rstrip() + "\n", style="dim")
    chart.append(losses.rstrip())
    return chart


def human_count(value: float) -> str:
    """Format a count or a rate in powers of 1000: "640", "73.4k", "1.2M", "310G"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"))


def human_bytes(value: float) -> str:
    """Format bytes in powers of 1024: "3.4 GiB"."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_flops(value: float) -> str:
    """Format FLOP/s: "310 GFLOP/s"."""
    return _scaled(value, 1000, (" FLOP/s", " kFLOP/s", " MFLOP/s", " GFLOP/s", " TFLOP/s", " PFLOP/s", " EFLOP/s"))


def human_position(value: int) -> str:
    """Format a position or a length: "64Ki" if it is a multiple of 1024, else its digits."""
    for unit, suffix in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if value >= unit and value % unit == 0:
            return f"{value // unit}{suffix}"
    return str(value)


def human_duration(seconds: float) -> str:
    """Format seconds as "12ms", "1.2s", "42s", "2m10s", "3h05m", "2d04h"; "0s" below zero, "?" if not finite."""
    if not math.isfinite(seconds):
        return "?"
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms"
    if 0 < seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    if not math.isfinite(value):
        return f"?{units[0]}"
    index = 0
    while abs(value) >= base - 0.5 and index < len(units) - 1:  # 999.6 would round to 1000
        value /= base
        index += 1
    digits = 0 if (value == int(value) and index == 0) or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f}{units[index]}"

"""Plots of a run from its `metrics.jsonl`: the loss by step and by position, and router statistics."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from longctx.engines.metrics import EvaluationMetrics, PositionLoss, RunInfo, StepMetrics, read_metrics
from longctx.errors import UserError
from longctx.files import writing
from longctx.train.display import human_count, human_position
from longctx.train.plot_routing import routing_figure
from longctx.train.plot_style import BASELINE, TEXT, smooth, tidy

FEW_TOKENS = 100
"""Means over fewer tokens vary by more than about 0.2 nats from sample to sample."""

_TRAIN, _HELDOUT = "#2563eb", "#c2410c"
_EARLIER = 6  # earlier evaluations in the plot by position


def draw(metrics_path: Path, out_dir: Path) -> list[Path]:
    """Plot `loss.png`, `loss_by_position.png` if there was an evaluation, and `routing.png` if the model has routers,
    into `out_dir`; return their paths.

    Raises UserError if the metrics cannot be read or contain no step, or the plots cannot be written.
    """
    metrics = read_metrics(metrics_path)
    if not metrics.steps:
        raise UserError(f"{metrics_path} has no steps to plot; train at least one step first")
    info = metrics.runs[-1] if metrics.runs else None
    stages = stage_starts(metrics.runs)
    figures = {"loss.png": loss_figure(metrics.steps, metrics.evaluations, info, stages)}
    if any(_known(evaluation.positions) for evaluation in metrics.evaluations):
        figures["loss_by_position.png"] = position_figure(metrics.evaluations, stages)
    if any(step.routers for step in metrics.steps):
        figures["routing.png"] = routing_figure(metrics.steps, metrics.evaluations)
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(out_dir / name, dpi=150)
    return [out_dir / name for name in figures]


def stage_starts(runs: list[RunInfo]) -> dict[str, int]:
    """Return the step after which each stage began, by name, in order; nothing if the recipe has no stages."""
    starts: dict[str, int] = {}
    for run in runs:
        if run.stage:
            starts.setdefault(run.stage, run.step)
    return starts


def loss_figure(
    steps: list[StepMetrics],
    evaluations: list[EvaluationMetrics],
    info: RunInfo | None,
    stages: Mapping[str, int] = MappingProxyType({}),
) -> Figure:
    """Plot training loss, held-out loss and the unigram baseline over steps, with a token axis at the top.

    `stages`: the step after which each began, by name; each is marked.
    """
    figure, axes = _figure()
    x = np.array([metrics.step for metrics in steps], dtype=np.float64)
    loss = np.array([metrics.loss for metrics in steps], dtype=np.float64)
    finite = np.isfinite(loss)
    window = len(loss) // 25
    if window < 3:
        axes.plot(x, np.where(finite, loss, np.nan), color=_TRAIN, marker=".", clip_on=False, label="training")
    else:
        axes.plot(x, np.where(finite, loss, np.nan), color=_TRAIN, alpha=0.25, linewidth=0.8)
        label = f"training, moving average of {window // 2 * 2 + 1} points"
        axes.plot(x, smooth(loss, window), color=_TRAIN, label=label)
    # The held-out sequences of a stage have its length: no line between two stages.
    breaks = [(start + 0.5, math.nan) for start in stages.values()]
    heldout = sorted([*((float(e.step), e.loss) for e in evaluations if math.isfinite(e.loss)), *breaks])
    if len(heldout) > len(breaks):
        axes.plot(
            *zip(*heldout, strict=True), color=_HELDOUT, marker="o", markersize=5, clip_on=False, label="held-out"
        )
    if info is not None and info.unigram_loss is not None:
        label = f"unigram baseline ({info.unigram_loss:.2f})"
        axes.axhline(info.unigram_loss, color=BASELINE, linestyle="--", linewidth=1.2, label=label)
    if not finite.all():
        # In axes coordinates, since they have no place on the loss scale.
        axes.plot(
            x[~finite],
            np.full((~finite).sum(), 0.02),
            "x",
            transform=axes.get_xaxis_transform(),
            color="#b91c1c",
            label=f"loss not finite ({(~finite).sum()} steps)",
        )
    axes.set(xlim=(0, x[-1]), xlabel="step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, start in stages.items():
        if start:
            axes.axvline(start, color=BASELINE, linewidth=0.8)
        axes.annotate(
            name,
            (start, 0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 4),
            textcoords="offset points",
            va="bottom",
            color=TEXT,
            fontsize=9,
        )
    _token_axis(axes, steps)
    _legend(figure)
    return figure


def _token_axis(axes: Axes, steps: list[StepMetrics]) -> None:
    """Add a token axis at the top. Steps may differ in tokens, so its scale follows the counts."""
    x = np.array([0, *(metrics.step for metrics in steps)], dtype=np.float64)
    tokens = np.array([0, *(metrics.tokens for metrics in steps)], dtype=np.float64)
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, tokens[-1]) if 0 <= tick <= tokens[-1]]
    upper = axes.twiny()
    upper.set_xlim(axes.get_xlim())
    upper.set_xticks(np.interp(ticks, tokens, x), [human_count(tick).replace(".0", "") for tick in ticks])
    upper.set_xlabel("tokens", color=TEXT)
    tidy(upper, grid=False)


def position_figure(evaluations: list[EvaluationMetrics], stages: Mapping[str, int] = MappingProxyType({})) -> Figure:
    """Plot held-out loss by position in the context: the last evaluation, and earlier ones faded.

    With several `stages`, which began after these steps, the earlier ones are the last of each stage. At least one
    evaluation has a bucket with tokens. A bucket of fewer than `FEW_TOKENS` is a hollow marker off the line, and is
    left out of earlier evaluations.
    """
    figure, axes = _figure()
    *earlier, last = [evaluation for evaluation in evaluations if _known(evaluation.positions)]
    if len(stages) > 1:
        ends = {_stage_at(evaluation.step, stages): evaluation for evaluation in earlier}
        labels = {e.step: f"{name}, step {e.step}" for name, e in ends.items() if name != _stage_at(last.step, stages)}
        shown = [evaluation for evaluation in earlier if evaluation.step in labels]
    else:
        shown = _spread(earlier, _EARLIER)
        steps = f"steps {shown[0].step} to " if len(shown) > 1 else "step "
        labels = {shown[-1].step: f"{steps}{shown[-1].step}"} if shown else {}
    for number, evaluation in enumerate(shown):
        buckets = [bucket for bucket in _known(evaluation.positions) if bucket.tokens >= FEW_TOKENS]
        alpha = 0.15 + 0.35 * (number + 1) / len(shown)
        axes.plot(
            [_context(bucket) for bucket in buckets],
            [bucket.loss for bucket in buckets],
            color=_HELDOUT,
            alpha=alpha,
            linewidth=1.2,
            label=labels.get(evaluation.step),
        )
    name_last = f"{_stage_at(last.step, stages)}, " if len(stages) > 1 else ""
    buckets = _known(last.positions)
    reliable = [bucket for bucket in buckets if bucket.tokens >= FEW_TOKENS]
    axes.plot(
        [_context(bucket) for bucket in buckets],
        [bucket.loss if bucket.tokens >= FEW_TOKENS else math.nan for bucket in buckets],
        color=_HELDOUT,
        linewidth=2,
        marker="o",
        markersize=5,
        label=f"{name_last}step {last.step}" if reliable else None,
    )
    few = [bucket for bucket in buckets if bucket.tokens < FEW_TOKENS]
    if few:
        axes.plot(
            [_context(bucket) for bucket in few],
            [bucket.loss for bucket in few],
            "o",
            color=_HELDOUT,
            markersize=5,
            markerfacecolor="white",
            label=f"step {last.step}, from fewer than {FEW_TOKENS} tokens",
        )
    # Labelled with values: the gain from long context is a few hundredths beside the drop over the first tokens.
    for bucket in reliable[:: -max(1, math.ceil(len(reliable) / 8))]:
        axes.annotate(
            f"{bucket.loss:.2f}",
            (_context(bucket), bucket.loss),
            xytext=(0, -15),
            textcoords="offset points",
            ha="center",
            color=TEXT,
            fontsize=9,
        )
    axes.margins(y=0.1)
    axes.set_xscale("log", base=2)
    powers = 2.0 ** np.arange(0, buckets[-1].hi.bit_length() + 1)
    powers = powers[powers <= buckets[-1].hi]
    axes.xaxis.set_major_locator(FixedLocator(powers[:: 1 if len(powers) <= 12 else 2].tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_position(round(value))))
    axes.set(xlabel="position in the context (tokens, log scale)", ylabel="held-out loss (nats per token)")
    _legend(figure)
    return figure


def _stage_at(step: int, stages: Mapping[str, int]) -> str:
    """Return the name of the stage in which a step was taken."""
    return next(name for name, start in reversed(list(stages.items())) if start < step or not start)


def _known(positions: tuple[PositionLoss, ...]) -> list[PositionLoss]:
    return [bucket for bucket in positions if bucket.tokens and math.isfinite(bucket.loss)]


def _context(bucket: PositionLoss) -> float:
    """Return the geometric centre of a bucket in context length: position 0 has a context of 1 token."""
    return math.sqrt((bucket.lo + 1) * bucket.hi)


def _spread(evaluations: list[EvaluationMetrics], most: int) -> list[EvaluationMetrics]:
    """Select at most `most` evenly spaced evaluations, including the first."""
    return evaluations[:: max(1, math.ceil(len(evaluations) / most))]


def _figure() -> tuple[Figure, Axes]:
    # Not pyplot: its figures are global until closed, and a trainer may plot from any thread.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Add the legend below the axes, clear of the curves."""
    figure.legend(frameon=False, labelcolor=TEXT, loc="outside lower center", ncols=3)

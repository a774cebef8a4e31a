"""The pictures of a run, drawn from its `metrics.jsonl`: the loss over steps and over position, and the routers."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from longctx.engines.metrics import EvaluationMetrics, PositionLoss, RunInfo, StepMetrics, read_metrics
from longctx.errors import UserError
from longctx.train.display import human_count, human_position
from longctx.train.plot_routing import routing_figure
from longctx.train.plot_style import BASELINE, TEXT, smooth, tidy

FEW_TOKENS = 100
"""A bucket's mean over fewer tokens strays by more than about a fifth of a nat from the next sample's."""

_TRAIN, _HELDOUT = "#2563eb", "#c2410c"
_EARLIER = 6  # earlier evaluations in the picture of positions


def draw(metrics_path: Path, out_dir: Path) -> list[Path]:
    """Draw `loss.png`, where there was an evaluation `loss_by_position.png`, and where something is routed
    `routing.png` into `out_dir`; returns their paths.

    Raises UserError where the metrics cannot be read or hold no step.
    """
    metrics = read_metrics(metrics_path)
    if not metrics.steps:
        raise UserError(f"{metrics_path} holds no step to draw; train at least one step first")
    out_dir.mkdir(parents=True, exist_ok=True)
    info = metrics.runs[-1] if metrics.runs else None
    pictures = {"loss.png": loss_figure(metrics.steps, metrics.evaluations, info)}
    if any(_known(evaluation.positions) for evaluation in metrics.evaluations):
        pictures["loss_by_position.png"] = position_figure(metrics.evaluations)
    if any(step.routers for step in metrics.steps):
        pictures["routing.png"] = routing_figure(metrics.steps, metrics.evaluations)
    for name, figure in pictures.items():
        figure.savefig(out_dir / name, dpi=150)
    return [out_dir / name for name in pictures]


def loss_figure(steps: list[StepMetrics], evaluations: list[EvaluationMetrics], info: RunInfo | None) -> Figure:
    """The loss over steps, with tokens along the upper edge: training, held-out, and the baseline where it is known."""
    figure, axes = _figure()
    at = np.array([metrics.step for metrics in steps], dtype=np.float64)
    loss = np.array([metrics.loss for metrics in steps], dtype=np.float64)
    finite = np.isfinite(loss)
    window = len(loss) // 25
    if window < 3:
        axes.plot(at, np.where(finite, loss, np.nan), color=_TRAIN, marker=".", clip_on=False, label="training")
    else:
        axes.plot(at, np.where(finite, loss, np.nan), color=_TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(at, smooth(loss, window), color=_TRAIN, label=f"training, mean of {window // 2 * 2 + 1} points")
    heldout = [(e.step, e.loss) for e in evaluations if math.isfinite(e.loss)]
    if heldout:
        axes.plot(
            *zip(*heldout, strict=True), color=_HELDOUT, marker="o", markersize=5, clip_on=False, label="held-out"
        )
    if info is not None and info.unigram_loss is not None:
        label = f"token frequencies alone ({info.unigram_loss:.2f})"
        axes.axhline(info.unigram_loss, color=BASELINE, linestyle="--", linewidth=1.2, label=label)
    if not finite.all():
        # In the frame's own height: there is no place for them among the losses.
        axes.plot(
            at[~finite],
            np.full((~finite).sum(), 0.02),
            "x",
            transform=axes.get_xaxis_transform(),
            color="#b91c1c",
            label=f"loss not finite ({(~finite).sum()} steps)",
        )
    axes.set(xlim=(0, at[-1]), xlabel="step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _token_axis(axes, steps)
    _legend(figure)
    return figure


def _token_axis(axes: Axes, steps: list[StepMetrics]) -> None:
    """Tokens along the upper edge. Steps may differ in their tokens, so its scale follows what was counted."""
    at = np.array([0, *(metrics.step for metrics in steps)], dtype=np.float64)
    tokens = np.array([0, *(metrics.tokens for metrics in steps)], dtype=np.float64)
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, tokens[-1]) if 0 <= tick <= tokens[-1]]
    upper = axes.twiny()
    upper.set_xlim(axes.get_xlim())
    upper.set_xticks(np.interp(ticks, tokens, at), [human_count(tick).replace(".0", "") for tick in ticks])
    upper.set_xlabel("tokens", color=TEXT)
    tidy(upper, grid=False)


def position_figure(evaluations: list[EvaluationMetrics]) -> Figure:
    """The held-out loss over the position in the context: the last evaluation, and earlier ones faintly.

    One of them at least has a bucket with tokens. A bucket of fewer than `FEW_TOKENS` stands apart from the line, as
    a hollow point; in earlier evaluations it is left out.
    """
    figure, axes = _figure()
    *earlier, last = [evaluation for evaluation in evaluations if _known(evaluation.positions)]
    shown = _spread(earlier, _EARLIER)
    label = f"steps {shown[0].step} to {shown[-1].step}" if len(shown) > 1 else "".join(f"step {e.step}" for e in shown)
    for number, evaluation in enumerate(shown):
        buckets = [bucket for bucket in _known(evaluation.positions) if bucket.tokens >= FEW_TOKENS]
        strength = 0.15 + 0.35 * (number + 1) / len(shown)
        axes.plot(
            [_context(bucket) for bucket in buckets],
            [bucket.loss for bucket in buckets],
            color=_HELDOUT,
            alpha=strength,
            linewidth=1.2,
            label=label if number == len(shown) - 1 else None,
        )
    buckets = _known(last.positions)
    sure = [bucket for bucket in buckets if bucket.tokens >= FEW_TOKENS]
    axes.plot(
        [_context(bucket) for bucket in buckets],
        [bucket.loss if bucket.tokens >= FEW_TOKENS else math.nan for bucket in buckets],
        color=_HELDOUT,
        linewidth=2,
        marker="o",
        markersize=5,
        label=f"step {last.step}" if sure else None,
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
    # Written out, because what a long context is worth is a few hundredths beside the fall of the first tokens.
    for bucket in sure[:: -max(1, math.ceil(len(sure) / 8))]:
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
    axes.set(xlabel="position in the context (tokens read, logarithmic)", ylabel="held-out loss (nats per token)")
    _legend(figure)
    return figure


def _known(positions: tuple[PositionLoss, ...]) -> list[PositionLoss]:
    return [bucket for bucket in positions if bucket.tokens and math.isfinite(bucket.loss)]


def _context(bucket: PositionLoss) -> float:
    """The middle of the bucket, in logarithms, of the tokens that its predictions see: position 0 sees itself."""
    return math.sqrt((bucket.lo + 1) * bucket.hi)


def _spread(evaluations: list[EvaluationMetrics], most: int) -> list[EvaluationMetrics]:
    """At most `most` of them, evenly spread, the first among them."""
    return evaluations[:: max(1, math.ceil(len(evaluations) / most))]


def _figure() -> tuple[Figure, Axes]:
    # Not pyplot: its figures are global and stay until closed, and a trainer may draw from any thread.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Under the axes, where no curve can run through it."""
    figure.legend(frameon=False, labelcolor=TEXT, loc="outside lower center", ncols=3)

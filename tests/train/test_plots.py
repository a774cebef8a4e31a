"""The pictures of a run show what was measured, and say where it cannot be trusted."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from longctx.engines.metrics import EvaluationMetrics, MetricsWriter, PositionLoss, RunInfo, StepMetrics
from longctx.errors import UserError
from longctx.train.plots import FEW_TOKENS, draw, loss_figure, position_figure

RUN = RunInfo(1000, 1, {}, "a processor", "fp32", 6e3, 1e9, {}, unigram_loss=3.0)


def step(number: int, loss: float, tokens: int | None = None) -> StepMetrics:
    return StepMetrics(number, 100, loss, 1e-3, 1.0, tokens or 1000 * number, 1e3, 0.5, 1, 1.0, 1.0)


def falling(count: int) -> list[StepMetrics]:
    return [step(number, 2 + 3 / number) for number in range(1, count + 1)]


def evaluation(number: int, *tokens: int) -> EvaluationMetrics:
    """Buckets [0, 1), [1, 2), [2, 4), … of that many tokens each; the loss of bucket i is 5 - i / 10."""
    edges = [0, *(2**i for i in range(len(tokens)))]
    buckets = zip(edges, edges[1:], tokens, strict=False)
    return EvaluationMetrics(
        number, 2.5, tuple(PositionLoss(lo, hi, 5 - i / 10, count) for i, (lo, hi, count) in enumerate(buckets))
    )


def lines(figure_lines: list[Line2D]) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in figure_lines}


def xs(line: Line2D) -> list[float]:
    return [float(x) for x in np.asarray(line.get_xdata())]


def ys(line: Line2D) -> list[float]:
    return [float(y) for y in np.asarray(line.get_ydata())]


def test_both_pictures_of_a_run(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(RUN)
        for metrics in falling(30):
            writer.write(metrics)
        writer.write(evaluation(30, 500, 500, 500))
    out = tmp_path / "run" / "pictures"
    assert draw(tmp_path / "metrics.jsonl", out) == [out / "loss.png", out / "loss_by_position.png"]
    for name in ("loss.png", "loss_by_position.png"):
        picture = imread(out / name)
        assert picture.shape == (675, 1200, 4)
        assert picture.std() > 0.01, "not a blank page"


@pytest.mark.parametrize("evaluations", [[], [EvaluationMetrics(1, math.nan, (PositionLoss(0, 1, math.nan, 0),))]])
def test_without_an_evaluation_only_the_loss(tmp_path: Path, evaluations: list[EvaluationMetrics]) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(step(1, 5.0))
        for metrics in evaluations:
            writer.write(metrics)
    assert draw(tmp_path / "metrics.jsonl", tmp_path) == [tmp_path / "loss.png"]


def test_without_a_step_nothing_to_draw(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(RUN)
    with pytest.raises(UserError, match="has no steps to plot; train at least one step"):
        draw(tmp_path / "metrics.jsonl", tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(step(1, 5.0))
    (tmp_path / "pictures").write_text("in the way")
    with pytest.raises(UserError, match=r"pictures cannot be written: File exists\. Make it writable, or choose"):
        draw(tmp_path / "metrics.jsonl", tmp_path / "pictures")


def test_the_loss_figure_holds_each_curve() -> None:
    figure = loss_figure(falling(200), [evaluation(100), evaluation(200)], RUN)
    axes = figure.axes[0]
    curves = lines(axes.get_lines())
    assert {"held-out", "unigram baseline (3.00)"} < set(curves)
    (smoothed,) = (line for label, line in curves.items() if label.startswith("training, moving average of"))
    assert len(xs(smoothed)) == 200
    assert xs(curves["held-out"]) == [100, 200]
    assert curves["unigram baseline (3.00)"].get_linestyle() == "--"
    assert axes.get_xlim() == (0, 200)
    assert "nats per token" in axes.get_ylabel()


def test_a_short_run_is_drawn_as_it_is() -> None:
    (curve,) = loss_figure(falling(3), [], None).axes[0].get_lines()
    assert curve.get_label() == "training"
    assert ys(curve) == [5.0, 3.5, 3.0]


def test_the_baseline_is_drawn_only_where_it_is_known() -> None:
    figure = loss_figure(falling(3), [], replace(RUN, unigram_loss=None))
    assert not any("unigram" in label for label in lines(figure.axes[0].get_lines()))


def test_a_loss_that_is_not_finite_is_marked_at_its_step() -> None:
    steps = [step(1, 5.0), step(2, math.nan), step(3, math.inf), step(4, 4.0)]
    curves = lines(loss_figure(steps, [], None).axes[0].get_lines())
    assert xs(curves["loss not finite (2 steps)"]) == [2, 3]
    np.testing.assert_array_equal(np.isnan(ys(curves["training"])), [False, True, True, False])


def test_the_upper_axis_counts_tokens() -> None:
    """Also where steps differ: here the second ten have three times the tokens of the first."""
    steps = [step(i, 3.0, tokens=1000 * min(i, 10) + 3000 * max(0, i - 10)) for i in range(1, 21)]
    upper = loss_figure(steps, [], None).axes[1]
    labels = [label.get_text() for label in upper.get_xticklabels()]
    assert dict(zip(labels, upper.get_xticks(), strict=True))["40k"] == 20
    assert dict(zip(labels, upper.get_xticks(), strict=True))["16k"] == 12
    assert upper.get_xlim() == (0, 20)


def test_buckets_of_few_tokens_stand_apart() -> None:
    axes = position_figure([evaluation(10, 8, FEW_TOKENS - 1, FEW_TOKENS, 0, 900)]).axes[0]
    curves = lines(axes.get_lines())
    curve, few = curves["step 10"], curves[f"step 10, from fewer than {FEW_TOKENS} tokens"]
    np.testing.assert_allclose(ys(curve), [math.nan, math.nan, 4.8, 4.6])
    np.testing.assert_allclose(ys(few), [5.0, 4.9])
    assert few.get_markerfacecolor() == "white"
    assert [text.get_text() for text in axes.texts] == ["4.60", "4.80"], "only means that hold are written out"


def test_a_bucket_stands_in_its_middle_on_a_base_2_axis() -> None:
    axes = position_figure([evaluation(10, 500, 500, 500, 500)]).axes[0]
    expected = [1.0, 2.0, math.sqrt(3 * 4), math.sqrt(5 * 8)]
    np.testing.assert_allclose(xs(lines(axes.get_lines())["step 10"]), expected)
    assert axes.get_xscale() == "log"
    assert axes.get_xticks().tolist() == [1, 2, 4, 8]


def test_earlier_evaluations_are_faint_and_few() -> None:
    evaluations = [evaluation(number, 500, 500) for number in range(1, 101)]
    *earlier, last = position_figure(evaluations).axes[0].get_lines()
    assert 2 <= len(earlier) <= 6
    assert last.get_label() == "step 100"
    strengths = [line.get_alpha() or 1.0 for line in earlier]
    assert strengths == sorted(strengths)
    assert strengths[-1] <= 0.5


STAGES = {"short": 0, "long": 20}


def test_the_loss_figure_marks_where_a_stage_begins_and_joins_no_held_out_losses_of_two() -> None:
    evaluations = [evaluation(number, 500) for number in (10, 20, 30)]
    axes = loss_figure(falling(30), evaluations, None, STAGES).axes[0]
    assert [text.get_text() for text in axes.texts] == ["short", "long"]
    assert [text.xy[0] for text in axes.texts if isinstance(text, Annotation)] == [0, 20]
    assert [xs(line) for line in axes.get_lines() if set(xs(line)) == {20}] == [[20, 20]], "a line at the second only"
    heldout = lines(axes.get_lines())["held-out"]
    np.testing.assert_allclose(ys(heldout), [math.nan, 2.5, 2.5, math.nan, 2.5])


def test_the_last_evaluation_of_each_stage_is_beside_that_of_the_last() -> None:
    evaluations = [evaluation(number, 500, 500, 500) for number in (10, 20, 30, 40)]
    *earlier, last = position_figure(evaluations, STAGES).axes[0].get_lines()
    assert [line.get_label() for line in earlier] == ["short, step 20"]
    assert last.get_label() == "long, step 40"

"""Figure of the routers: a panel per measure, a curve per layer."""

from dataclasses import replace
from pathlib import Path

from longctx.engines.metrics import MetricsWriter, RouterMetrics, StepMetrics
from longctx.train.plot_routing import routing_figure
from longctx.train.plots import draw
from tests.train.test_plots import evaluation, falling, lines, xs, ys


def routed(count: int, dropped: float = 0.0) -> list[StepMetrics]:
    names = [f"blocks.{n}.{part}" for n in range(3) for part in ("mixer", "ffn")]
    return [
        replace(
            s, routers={name: RouterMetrics(1 + n + 1 / s.step, 2.0 - n / 10, dropped) for n, name in enumerate(names)}
        )
        for s in falling(count)
    ]


def test_routers_are_drawn_by_layer_where_there_are_any(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for metrics in routed(4):
            writer.write(metrics)
    assert draw(tmp_path / "metrics.jsonl", tmp_path)[-1] == tmp_path / "routing.png"
    load, entropy = routing_figure(routed(4), []).axes
    drawn = lines(load.get_lines())
    assert list(drawn) == [f"blocks.{n}.{part}" for n in range(3) for part in ("mixer", "ffn")]
    assert xs(drawn["blocks.1.ffn"]) == [1, 2, 3, 4]
    assert ys(drawn["blocks.1.ffn"]) == [4 + 1 / n for n in (1, 2, 3, 4)]
    heads, experts, deeper = (drawn[name] for name in ("blocks.1.mixer", "blocks.1.ffn", "blocks.2.ffn"))
    assert heads.get_linestyle() != experts.get_linestyle() == deeper.get_linestyle()
    assert tuple(heads.get_color()) == tuple(experts.get_color()) != tuple(deeper.get_color())
    assert ys(lines(entropy.get_lines())["blocks.0.ffn"]) == [1.9] * 4


def test_drops_and_fluctuation_have_panels_where_they_are_known() -> None:
    first, second = (replace(evaluation(n, 500), fluctuation=f) for n, f in ((2, {}), (4, {"blocks.0.ffn": 0.25})))
    figure = routing_figure(routed(4, dropped=0.1), [first, second])
    assert len(figure.axes) == 4
    assert ys(figure.axes[2].get_lines()[0]) == [0.1] * 4
    (points,) = [line for line in figure.axes[3].get_lines() if len(xs(line))]
    assert (xs(points), ys(points)) == ([4], [0.25])

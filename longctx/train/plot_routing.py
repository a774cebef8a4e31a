"""The picture of a run's routers: how even their load is, how sure they are, how often they change their mind."""

import math
from collections.abc import Callable, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longctx.engines.metrics import EvaluationMetrics, RouterMetrics, StepMetrics
from longctx.train.plot_style import TEXT, smoothed, tidy

_FEW = 12  # layers that the legend names one by one


def routing_figure(steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics]) -> Figure:
    """Over steps and for each router: the fullest load, the entropy of its choices, the share of choices that were
    dropped, where there are any, and the share of held-out tokens whose choice has changed, where it is known.

    Some step has a router.
    """
    names = list(dict.fromkeys(name for step in steps for name in step.routers))
    # A layer's colour is its depth; routers of heads are dashed.
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    shades = colormaps["viridis"]([n / max(1, len(layers) - 1) * 0.9 for n in range(len(layers))])
    looks = {
        name: {"color": shades[layers.index(name.rpartition(".")[0])], "linestyle": "--" if "mixer" in name else "-"}
        for name in names
    }
    panels: list[Callable[[Axes], None]] = []

    def over_steps(title: str, value: Callable[[RouterMetrics], float]) -> Callable[[Axes], None]:
        def panel(axes: Axes) -> None:
            for name in names:
                at = [s.step for s in steps if name in s.routers]
                values = [value(s.routers[name]) for s in steps if name in s.routers]
                axes.plot(at, smoothed(values), linewidth=1.2, label=name, **looks[name])
            axes.set_title(title, fontsize=10, color=TEXT, loc="left")

        return panel

    panels.append(over_steps("fullest load, of the mean", lambda router: router.imbalance))
    panels.append(over_steps("entropy of the choice (nats)", lambda router: router.entropy))
    if any(router.dropped for step in steps for router in step.routers.values()):
        panels.append(over_steps("share of choices dropped", lambda router: router.dropped))
    known = [e for e in evaluations if e.fluctuation]

    def fluctuation(axes: Axes) -> None:
        for name in names:
            at = [e.step for e in known if name in e.fluctuation]
            values = [e.fluctuation[name] for e in known if name in e.fluctuation]
            axes.plot(at, values, linewidth=1.2, marker="o", markersize=3, clip_on=False, **looks[name])
        axes.set_title("tokens whose choice changed\nsince the evaluation before", fontsize=10, color=TEXT, loc="left")

    if known:
        panels.append(fluctuation)
    figure = Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        tidy(axes)
        panel(axes)
        axes.set_xlabel("step")
        axes.set_xlim(0, max(s.step for s in steps))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.axes[0].set_ylim(bottom=1)
    for axes in figure.axes[1:]:
        axes.set_ylim(bottom=0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    shown = range(0, len(labels), math.ceil(len(labels) / _FEW))
    figure.legend(
        [handles[n] for n in shown],
        [labels[n] for n in shown],
        frameon=False,
        labelcolor=TEXT,
        loc="outside lower center",
        ncols=min(6, len(shown)),
    )
    return figure

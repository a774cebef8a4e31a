"""Routing plots of a run: load balance, router entropy, dropped tokens, routing fluctuation."""

import math
from collections.abc import Callable, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from longctx.engines.metrics import EvaluationMetrics, RouterMetrics, StepMetrics
from longctx.train.plot_style import TEXT, smoothed, tidy

_FEW = 12  # the legend names at most about so many routers


def routing_figure(steps: Sequence[StepMetrics], evaluations: Sequence[EvaluationMetrics]) -> Figure:
    """Plot, over steps and for each router: the maximum load, the routing entropy, the fraction dropped for capacity if
    any was, and the share of held-out tokens routed differently than before if it is known.

    At least one step has a router.
    """
    names = list(dict.fromkeys(name for step in steps for name in step.routers))
    # Colour is depth; head routers are dashed.
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    shades = colormaps["viridis"]([n / max(1, len(layers) - 1) * 0.9 for n in range(len(layers))])
    styles = {
        name: {"color": shades[layers.index(name.rpartition(".")[0])], "linestyle": "--" if "mixer" in name else "-"}
        for name in names
    }
    panels: list[Callable[[Axes], None]] = []

    def over_steps(title: str, value: Callable[[RouterMetrics], float]) -> Callable[[Axes], None]:
        def panel(axes: Axes) -> None:
            for name in names:
                x = [s.step for s in steps if name in s.routers]
                values = [value(s.routers[name]) for s in steps if name in s.routers]
                axes.plot(x, smoothed(values), linewidth=1.2, label=name, **styles[name])
            axes.set_title(title, fontsize=10, color=TEXT, loc="left")

        return panel

    panels.append(over_steps("max load / mean load", lambda router: router.imbalance))
    panels.append(over_steps("routing entropy (nats)", lambda router: router.entropy))
    if any(router.dropped for step in steps for router in step.routers.values()):
        panels.append(over_steps("fraction dropped (capacity)", lambda router: router.dropped))
    compared = [e for e in evaluations if e.fluctuation]

    def fluctuation(axes: Axes) -> None:
        for name in names:
            x = [e.step for e in compared if name in e.fluctuation]
            values = [e.fluctuation[name] for e in compared if name in e.fluctuation]
            axes.plot(x, values, linewidth=1.2, marker="o", markersize=3, clip_on=False, **styles[name])
        axes.set_title("held-out tokens rerouted\nsince the last evaluation", fontsize=10, color=TEXT, loc="left")

    if compared:
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

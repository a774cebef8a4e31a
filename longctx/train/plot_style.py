"""Plot style: colours, axes and smoothing shared by the plots of a run."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

BASELINE, TEXT = "#6b7280", "#374151"
_GRID = "#e5e7eb"


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Smooth with a centred moving average over `window` values, ignoring those that are not finite; keeps the shape.

    The window shrinks symmetrically towards both ends, so the curve neither lags nor bends there. NaN where a window
    has no finite value.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(index, index[::-1]))
    count = counts[index + half + 1] - counts[index - half]
    total = sums[index + half + 1] - sums[index - half]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """Smooth over a 25th of the values; fewer than 75 values are returned as they are."""
    window = len(values) // 25
    array = np.array(values, dtype=np.float64)
    return array if window < 3 else smooth(array, window)


def tidy(axes: Axes, *, grid: bool = True) -> None:
    """Remove all spines but the bottom one, mute the ticks, and draw a horizontal grid if `grid`."""
    if grid:
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(BASELINE)
    axes.tick_params(colors=TEXT, length=3)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)

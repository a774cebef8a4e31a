"""What the pictures of a run share: colours, axes without clutter, the smoothing of what jumps from step to step."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

BASELINE, TEXT = "#6b7280", "#374151"
_GRID = "#e5e7eb"


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over `window` values, of which those that are not finite are left out; shape kept.

    Towards both ends the window shrinks evenly, so that the curve neither lags nor bends there. NaN where a window
    holds no finite value.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    half = np.minimum(window // 2, np.minimum(at, at[::-1]))
    count = counts[at + half + 1] - counts[at - half]
    total = sums[at + half + 1] - sums[at - half]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """`smooth` over a 25th of the values, where that is 3 at least."""
    window = len(values) // 25
    found = np.array(values, dtype=np.float64)
    return found if window < 3 else smooth(found, window)


def tidy(axes: Axes, *, grid: bool = True) -> None:
    """No frame but the lower edge, muted ticks, horizontal lines behind the curves where wanted."""
    if grid:
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(BASELINE)
    axes.tick_params(colors=TEXT, length=3)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)

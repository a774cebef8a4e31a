"""Style of the figures: smoothed curves."""

import math

import numpy as np
import pytest

from longctx.train.plot_style import smooth


@pytest.mark.parametrize("window", [1, 2, 5, 50])
def test_smoothing_keeps_straight_lines_straight(window: int) -> None:
    line = np.linspace(5.0, 2.0, 40)
    np.testing.assert_allclose(smooth(line, window), line)


def test_smoothing_averages_what_is_finite() -> None:
    values = np.array([1.0, math.nan, 3.0, math.inf, 5.0])
    np.testing.assert_allclose(smooth(values, 3), [1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_array_equal(smooth(np.full(3, math.nan), 3), np.full(3, math.nan))


def test_smoothing_removes_noise() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    assert smooth(noise, 25)[12:-12].std() == pytest.approx(1 / 5, rel=0.2)

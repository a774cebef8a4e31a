"""Recovery: the time between the last step before a stop and the first one after it, by one clock."""

import os
from pathlib import Path

import pytest

from longctx.engines.metrics import MetricsWriter
from longctx.train.recovery import LastStep, find_last_step, recovery_text
from tests.engines.test_metrics import RUN, step


def write(out: Path, *numbers: int, time: float) -> None:
    with MetricsWriter(out, after_step=min(numbers) - 1) as writer:
        writer.write(RUN)
        for number in numbers:
            writer.write(step(number))
    os.utime(out / "metrics.jsonl", (time, time))


def test_the_last_step_is_that_of_the_metrics(tmp_path: Path) -> None:
    assert find_last_step(tmp_path) is None
    with MetricsWriter(tmp_path) as writer:
        writer.write(RUN)
    assert find_last_step(tmp_path) is None
    write(tmp_path, 1, 2, 3, time=500.0)
    assert find_last_step(tmp_path) == LastStep(3, 500.0)


@pytest.mark.parametrize(
    ("resumed_from", "text"),
    [
        (1, "Recovered 1m05s after the last step before; 2 steps are repeated."),
        (2, "Recovered 1m05s after the last step before; 1 step is repeated."),
        (3, "Recovered 1m05s after the last step before; 0 steps are repeated."),
    ],
)
def test_the_time_is_told_with_what_is_repeated(tmp_path: Path, resumed_from: int, text: str) -> None:
    write(tmp_path, 1, 2, 3, time=500.0)
    last = find_last_step(tmp_path)
    assert last is not None
    write(tmp_path, resumed_from + 1, time=565.0)
    assert recovery_text(last, resumed_from, tmp_path) == text

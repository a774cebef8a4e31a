"""Records, points and a tracker that keeps what it is told, for the tests of trackers."""

import threading
from collections.abc import Sequence
from pathlib import Path

from longctx.engines.metrics import (
    EvaluationMetrics,
    PositionLoss,
    RouterMetrics,
    RunInfo,
    SpikeMetrics,
    StepMetrics,
    WaitMetrics,
)
from longctx.tracking.base import Outcome, Point, TrackedRun

RUN = RunInfo(
    parameters=1_000_000,
    ranks=2,
    mesh={"dp_shard": 1, "cp": 2},
    device="a processor",
    precision="fp32",
    flops_per_token=6e6,
    matmul_rate=1e11,
    versions={"torch": "2.13.0"},
    attention={"layer 1, 3": "ring"},
)


def step(number: int, steps: int = 20) -> StepMetrics:
    return StepMetrics(
        step=number,
        steps=steps,
        loss=2.5,
        lr=1e-3,
        grad_norm=0.5,
        tokens=1024 * number,
        tokens_per_second=1e4,
        utilisation=0.4,
        memory_bytes=2**30,
        seconds=0.1,
        seconds_left=2.0,
        routers={"blocks.3.ffn": RouterMetrics(1.5, 0.7, 0.0)},
        waits=WaitMetrics(0.5, 0.25, 3),
    )


def evaluation(number: int) -> EvaluationMetrics:
    positions = (PositionLoss(0, 1, 4.0, 8), PositionLoss(1, 2, float("nan"), 0), PositionLoss(2, 4, 3.0, 8))
    return EvaluationMetrics(number, 2.6, positions, {"blocks.3.ffn": 0.25})


def spike(number: int) -> SpikeMetrics:
    return SpikeMetrics(number, 9.0, 2.5, 2.7, 30.0, 0.5, 1.5, in_a_row=1, action="skipped")


def point(number: int, **scalars: float) -> Point:
    return Point(number, 1e9 + number, scalars or {"train/loss": float(number)})


def tracked(out: Path, after_step: int = 0, previous_id: str | None = None, **recipe: object) -> TrackedRun:
    return TrackedRun("tiny", {"seed": 3, "optimizer": {"lr": 0.1}, **recipe}, out, after_step, previous_id)


class FakeTracker:
    """Keeps what it is told; raises `error`, if there is one, and stands still while `gate` is not set."""

    def __init__(self, run_id: str | None = None, where: str = "", advice: str = "") -> None:
        self.run_id, self.where, self.advice = run_id, where, advice
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.told: list[RunInfo | int | Outcome] = []
        """Constants, numbers of steps, and the outcome, in order."""
        self.changed = threading.Condition()

    def _tell(self, told: Sequence[RunInfo | int | Outcome]) -> None:
        self.entered.set()
        self.gate.wait()
        if self.error is not None:
            raise self.error
        with self.changed:
            self.told += told
            self.changed.notify_all()

    def describe(self, info: RunInfo) -> None:
        self._tell([info])

    def write(self, points: Sequence[Point]) -> None:
        self._tell([point.step for point in points])

    def close(self, outcome: Outcome) -> None:
        self._tell([outcome])

    def wait_for(self, told: int) -> None:
        """Wait until it was told so many things."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.told) >= told, timeout=30)

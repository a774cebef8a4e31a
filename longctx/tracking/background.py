"""Tracker in a thread of its own: training neither waits for it nor ends with it.

A tracker may wait for a network for minutes, or raise an error of any library. What it does not take is kept and
offered again every `RETRY` seconds, up to `MOST` points, of which the oldest are dropped first: `metrics.jsonl` has
them all. The first failure of a start is one warning, and so is what is missing at the end.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial

from longctx.engines.metrics import FILE_NAME, RunInfo
from longctx.tracking.base import Outcome, Point, Tracker

RETRY = 30.0
"""Seconds between two attempts, after one failed."""
MOST = 10_000
"""Points that are kept for a tracker that takes none."""


class BackgroundTracker:
    """A tracker that is opened, called and closed in a thread. Its own methods return at once, but for the first and
    the last."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], patience: float) -> None:
        """Open the tracker, waiting for `patience` seconds. Raises what `open_tracker` raises, or TimeoutError.

        `name`: the tracker's, for messages.
        """
        self._name, self._open = name, open_tracker
        self._tracker: Tracker | None = None
        self._error: Exception | None = None
        """Why it could not be opened."""
        self._infos: list[RunInfo] = []
        self._points: list[Point] = []
        self._dropped = 0
        self._is_failing = self._has_failed = False
        """Whether the last attempt failed, and any of this start."""
        self._messages: list[str] = []
        self._outcome: Outcome | None = None
        """How the run ended; None while it trains."""
        self._changed = threading.Condition()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        if not self._opened.wait(patience):
            self._outcome = "failed"  # should it be opened yet, it is closed again
            raise TimeoutError(f"no answer for {patience:.0f} s")
        if self._error is not None:
            raise self._error

    @property
    def tracker(self) -> Tracker:
        """The tracker, of which only the constants are to be read."""
        assert self._tracker is not None, "the constructor raised an error"
        return self._tracker

    def describe(self, info: RunInfo) -> None:
        """Hand over constants of the run."""
        with self._changed:
            self._infos.append(info)
            self._changed.notify()

    def write(self, point: Point) -> None:
        """Hand over a point."""
        with self._changed:
            self._points.append(point)
            if len(self._points) > MOST:
                del self._points[0]
                self._dropped += 1
            self._changed.notify()

    def take_messages(self) -> list[str]:
        """Return what the user is to be told since the last call."""
        with self._changed:
            messages, self._messages = self._messages, []
            return messages

    def ask_to_close(self, outcome: Outcome) -> None:
        """Have the tracker deliver what it has, and close it."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify()

    def wait_for_close(self, patience: float) -> None:
        """Wait until the tracker is closed, `patience` seconds at most."""
        self._thread.join(patience)
        with self._changed:
            advice = f" {self.tracker.advice}" if self.tracker.advice else ""
            missing = self._dropped + len(self._points)
            if missing:
                self._messages.append(
                    f"WARNING: {self._name} lacks {missing} record{'s' * (missing != 1)} of this start.{advice}"
                )
            elif self._thread.is_alive():
                self._messages.append(f"WARNING: {self._name} was not done in time.{advice}")

    def _run(self) -> None:
        try:
            self._tracker = self._open()
        except Exception as error:  # noqa: BLE001 - each library raises its own; the constructor raises it
            self._error = error
            return
        finally:
            self._opened.set()
        tracker = self._tracker
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                outcome, infos, points = self._outcome, tuple(self._infos), tuple(self._points)
                dropped = self._dropped
            if self._attempt(partial(_deliver, tracker, infos, points)):
                with self._changed:
                    del self._infos[: len(infos)]
                    # Some were dropped from the list meanwhile, though they arrived.
                    gone = min(len(points), self._dropped - dropped)
                    self._dropped -= gone
                    del self._points[: len(points) - gone]
            if outcome is not None:
                self._attempt(partial(tracker.close, outcome))
                return
            if self._is_failing:
                with self._changed:
                    self._changed.wait_for(lambda: self._outcome is not None, timeout=RETRY)

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Call the tracker; return whether it raised nothing."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - each library raises its own, and none may end the training
            if not self._has_failed:
                self._report(
                    f"WARNING: {self._name} failed: {reason(error)}. Training goes on; {FILE_NAME} has every record."
                )
            self._is_failing = self._has_failed = True
            return False
        if self._is_failing:
            self._report(f"{self._name} works again.")
        self._is_failing = False
        return True

    def _has_work(self) -> bool:
        return self._outcome is not None or bool(self._infos) or bool(self._points)

    def _report(self, message: str) -> None:
        with self._changed:
            self._messages.append(message)


def _deliver(tracker: Tracker, infos: Sequence[RunInfo], points: Sequence[Point]) -> None:
    for info in infos:
        tracker.describe(info)
    if points:
        tracker.write(points)


def reason(error: Exception) -> str:
    """Return an error's first line with its class, for a message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}".rstrip(".: ")

"""A tracker in the background: nothing that it does ends or stalls the training, and nothing is lost unsaid."""

import threading
import time
from collections.abc import Iterator

import pytest

from longctx.tracking import background
from longctx.tracking.background import BackgroundTracker, reason
from tests.tracking.records import RUN, FakeTracker, point


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "RETRY", 0.01)


@pytest.fixture
def fake() -> Iterator[FakeTracker]:
    tracker = FakeTracker(advice="Upload it.")
    yield tracker
    tracker.gate.set()


def opened(fake: FakeTracker) -> BackgroundTracker:
    return BackgroundTracker("Fake", lambda: fake, patience=30)


def close(tracker: BackgroundTracker, patience: float = 30) -> list[str]:
    """Close it; return all messages that were not taken before."""
    tracker.ask_to_close("finished")
    tracker.wait_for_close(patience)
    return tracker.take_messages()


def test_everything_arrives_in_order_before_the_end(fake: FakeTracker) -> None:
    tracker = opened(fake)
    tracker.describe(RUN)
    for number in range(1, 101):
        tracker.write(point(number))
    assert close(tracker) == []
    assert fake.told == [RUN, *range(1, 101), "finished"]


def test_a_tracker_that_stands_still_stalls_nobody(fake: FakeTracker) -> None:
    tracker = opened(fake)
    fake.gate.clear()
    began = time.monotonic()
    for number in range(1, 4):
        tracker.write(point(number))
    messages = close(tracker, patience=0.05)
    assert time.monotonic() - began < 20
    assert messages == ["WARNING: Fake lacks 3 records of this start. Upload it."]


def test_a_tracker_that_stands_still_while_it_is_closed_is_left(fake: FakeTracker) -> None:
    tracker = opened(fake)
    tracker.write(point(1))
    fake.wait_for(1)
    fake.gate.clear()
    assert close(tracker, patience=0.05) == ["WARNING: Fake was not done in time. Upload it."]


def test_a_failure_is_one_warning_and_nothing_is_lost(fake: FakeTracker) -> None:
    tracker = opened(fake)
    fake.error = ConnectionError("refused\n  by the server")
    tracker.describe(RUN)
    messages: list[str] = []
    for number in range(1, 20):
        tracker.write(point(number))
        time.sleep(0.005)  # several attempts
    fake.error = None
    fake.wait_for(20)
    messages += tracker.take_messages()
    assert messages == [
        "WARNING: Fake failed: ConnectionError: refused by the server. Training goes on; metrics.jsonl has every "
        "record.",
        "Fake works again.",
    ]
    assert close(tracker) == []
    assert fake.told == [RUN, *range(1, 20), "finished"]


def test_what_never_arrived_is_counted_at_the_end(fake: FakeTracker) -> None:
    tracker = opened(fake)
    fake.error = OSError("disk")
    for number in range(1, 4):
        tracker.write(point(number))
    warning, missing = close(tracker)
    assert warning.startswith("WARNING: Fake failed: OSError: disk. Training")
    assert missing == "WARNING: Fake lacks 3 records of this start. Upload it."


def test_a_tracker_that_takes_nothing_does_not_fill_the_memory(
    fake: FakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "MOST", 10)
    tracker = opened(fake)
    fake.gate.clear()
    tracker.write(point(1))
    assert fake.entered.wait(30)
    for number in range(2, 32):
        tracker.write(point(number))
    fake.gate.set()
    assert close(tracker) == ["WARNING: Fake lacks 20 records of this start. Upload it."]
    assert fake.told == [1, *range(22, 32), "finished"], "the latest are kept"


def test_an_error_at_the_start_is_raised() -> None:
    def fail() -> FakeTracker:
        raise PermissionError("no")

    with pytest.raises(PermissionError, match="no"):
        BackgroundTracker("Fake", fail, patience=30)


def test_a_tracker_that_is_not_opened_in_time_is_closed_when_it_is(fake: FakeTracker) -> None:
    may_open = threading.Event()

    def slow() -> FakeTracker:
        may_open.wait()
        return fake

    with pytest.raises(TimeoutError, match="no answer for 0 s"):
        BackgroundTracker("Fake", slow, patience=0.01)
    may_open.set()
    fake.wait_for(1)
    assert fake.told == ["failed"]


def test_a_reason_is_one_line_that_is_not_too_long() -> None:
    assert reason(ValueError("a\n b. ")) == "ValueError: a b"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 1000))) == len("ValueError: ") + 301

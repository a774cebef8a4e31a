"""TensorBoard: each step once after a resumption, and constants of the run as text."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from longctx.errors import UserError
from longctx.tracking.tensorboard import TensorBoardTracker
from tests.tracking.records import RUN, point, tracked


def write(out: Path, first: int, last: int, after_step: int = 0) -> None:
    tracker = TensorBoardTracker(tracked(out, after_step))
    tracker.describe(RUN)
    tracker.write([point(number) for number in range(first, last + 1)])
    tracker.close("finished")


def test_each_step_is_shown_once_after_a_resumption(tmp_path: Path) -> None:
    write(tmp_path, 1, 8)
    write(tmp_path, 6, 10, after_step=5)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(number, number) for number in range(1, 11)]
    assert [event.wall_time for event in events] == [1e9 + number for number in range(1, 11)]
    assert b"a processor" in board.Tensors("run/text_summary")[0].tensor_proto.string_val[0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="tensorboard cannot be written: File exists"):
        TensorBoardTracker(tracked(tmp_path))

"""Checkpoints are complete or absent, whatever stops the run that writes them."""

import errno
import io
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import DefaultStager

from longctx.checkpoint.read import list_checkpoints, read_state
from longctx.checkpoint.retention import RetentionPolicy
from longctx.checkpoint.save import _STAGES_ONCE, Checkpointer, new_stager
from longctx.checkpoint.spike_state import SpikeState
from longctx.checkpoint.trainer_state import TrainerState
from longctx.errors import UserError
from tests.checkpoint.saving import measured, names, read_all, save, save_states, sharded, state, stopped_before


def written_and_read(folder: Path) -> tuple[float, TrainerState]:
    save(folder, 3)
    return read_all(folder / "step-00000003"), read_state(folder / "step-00000003")


@pytest.mark.parametrize("size", [1, 2])
def test_what_was_saved_is_read_again(ranks, tmp_path, size):
    assert ranks.run(written_and_read, tmp_path, size=size) == [(3.0, state(3))] * size
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize(("written", "read"), [(2, 1), (1, 2), (2, 4)])
def test_it_is_read_on_any_number_of_ranks(ranks, tmp_path, written, read):
    ranks.run(save, tmp_path, 3, size=written)
    assert ranks.run(read_all, tmp_path / "step-00000003", size=read) == [3.0] * read


def test_training_continues_while_a_checkpoint_is_written(ranks, tmp_path):
    assert ranks.run(changed_while_written, tmp_path, size=2) == [7.0, 7.0]


def changed_while_written(folder: Path) -> float:
    """Save 7, hold the writer until the tensors are 1000 higher, and read what was written."""
    changed = threading.Event()
    with held_until(changed):
        checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0)
        tensors = sharded(7.0)
        checkpointer.save(tensors, state(1))
        tensors["model"]["weight"] += 1000
        assert list_checkpoints(folder) == []
        changed.set()
        checkpointer.close()
    return read_all(folder / "step-00000001")


def test_a_save_does_not_wait_for_the_one_before(ranks, tmp_path):
    assert ranks.run(back_to_back, tmp_path, size=2) == [[1.0, 2.0, 3.0]] * 2


def back_to_back(folder: Path) -> list[float]:
    """Save 1 and 2 while the writer is held, and 3 once it is not; read what was written."""
    released = threading.Event()
    checkpointer = Checkpointer(folder, RetentionPolicy(3), timeout=20.0)
    tensors = sharded(1.0)
    with held_until(released):
        checkpointer.save(tensors, state(1))
        tensors["model"]["weight"] += 1
        checkpointer.save(tensors, state(2))
        tensors["model"]["weight"] += 1
        assert list_checkpoints(folder) == []
        threading.Timer(0.5, released.set).start()
        checkpointer.save(tensors, state(3))
        assert released.is_set(), "there is memory for two, and the third waited for the first"
        tensors["model"]["weight"] += 1000
        checkpointer.close()
    return [read_all(folder / f"step-{step:08d}") for step in (1, 2, 3)]


def test_saves_far_apart_use_one_copy_of_the_tensors(ranks, tmp_path):
    assert ranks.run(count_copies, tmp_path, size=2) == [1, 1]


def count_copies(folder: Path) -> int:
    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0)
    for step in (1, 2, 3):
        checkpointer.save(sharded(1.0), state(step))
        wait([future for future, _ in checkpointer._pending])
        dist.barrier()
    copies = len(checkpointer._stagers)
    checkpointer.close()
    return copies


def test_of_two_saves_that_fail_the_first_is_told(ranks, tmp_path):
    messages = ranks.run(fail_twice, tmp_path, size=2)
    assert len(set(messages)) == 1
    assert "step-00000001 could not be written: " in messages[0]


def fail_twice(folder: Path) -> str:
    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0)
    held = threading.Event()
    with held_until(held):
        for step in (1, 2):
            checkpointer.save(sharded(1.0), state(step))
        dist.barrier()
        if dist.get_rank() == 0:
            while not list(folder.glob("*.partial")):  # the writer would create it while it is removed
                time.sleep(0.01)
            while folder.exists():  # the other rank's writer may add a file meanwhile
                shutil.rmtree(folder, ignore_errors=True)
            folder.write_text("in the way")
        dist.barrier()
        held.set()
        with pytest.raises(UserError) as caught:
            checkpointer.wait()
    checkpointer.close()
    return str(caught.value)


@contextmanager
def held_until(event: threading.Event) -> Iterator[None]:
    stream = FileSystem.create_stream

    def held(self, path, mode):
        assert event.wait(20)
        return stream(self, path, mode)

    with patch.object(FileSystem, "create_stream", held):
        yield


def test_the_newest_ones_stay(ranks, tmp_path):
    ranks.run(save, tmp_path, 1, 2, 10, 11, size=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]


def save_with_stagers_of_one_use(folder: Path) -> None:
    """On a rank: as under torch 2.11 and 2.12, whose stagers are closed by the first state that they copy."""

    class OneUse(DefaultStager):
        def stage(self, *args, **kwargs):
            staged = super().stage(*args, **kwargs)
            self.close()
            return staged

    with patch("longctx.checkpoint.save.DefaultStager", OneUse), patch("longctx.checkpoint.save._STAGES_ONCE", True):
        save(folder, 1, 2)


def test_a_stager_that_serves_once_is_replaced(ranks, tmp_path):
    ranks.run(save_with_stagers_of_one_use, tmp_path, size=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert ranks.run(read_all, tmp_path / "step-00000002", size=1) == [2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or _STAGES_ONCE, reason="needs a GPU, and torch from 2.13")
def test_the_copy_of_a_gpus_tensors_is_page_locked_and_whole_when_it_is_returned():
    stager, x = new_stager(), torch.arange(2**24, device="cuda", dtype=torch.float32)
    for _ in range(2):
        x += 1
        want, staged = x.cpu(), stager.stage({"x": x})["x"]
        x.mul_(2)
        assert staged.is_pinned()
        assert torch.equal(staged, want)
        x.div_(2)
    stager.close()


def test_one_of_a_later_step_is_of_an_attempt_that_was_given_up(ranks, tmp_path):
    ranks.run(save, tmp_path, 1, 5, 9, size=2)
    ranks.run(save, tmp_path, 6, size=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


BEST = RetentionPolicy(1, sequences=8)


def test_milestones_stay(ranks, tmp_path):
    ranks.run(save_states, tmp_path, RetentionPolicy(1, every=4), *map(state, (2, 4, 6, 8, 10)), size=2)
    assert names(tmp_path) == ["step-00000004", "step-00000008", "step-00000010"]


def test_the_best_stays_until_there_is_a_better_one(ranks, tmp_path):
    states = measured(1, 3.0), measured(2, 2.0), state(3), measured(4, 2.5)
    best = ranks.run(save_states, tmp_path, BEST, *states, size=2)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    assert best == [(tmp_path / "step-00000002", 2.0)] * 2
    assert ranks.run(save_states, tmp_path, BEST, measured(5, 1.5), size=2)[0] == (tmp_path / "step-00000005", 1.5)
    assert names(tmp_path) == ["step-00000005"]


def test_the_best_is_the_best_of_those_that_are_there_after_going_back(ranks, tmp_path):
    """Those of the attempt that was given up, its milestones and its best, are not kept: a start would resume there."""
    retention = RetentionPolicy(1, every=2, sequences=8)
    ranks.run(save_states, tmp_path, retention, *(measured(step, 3 - step / 10) for step in (1, 2, 4, 5, 6)), size=1)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]
    (best,) = ranks.run(save_states, tmp_path, retention, measured(3, 2.9), size=1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert best == (tmp_path / "step-00000002", 2.8)


def test_a_best_that_is_damaged_is_passed_over(ranks, tmp_path):
    ranks.run(save_states, tmp_path, RetentionPolicy(3, sequences=8), measured(1, 1.0), measured(2, 2.0), size=1)
    (tmp_path / "step-00000001" / "trainer.json").write_text("{")
    (best,) = ranks.run(save_states, tmp_path, BEST, measured(3, 3.0), size=1)
    assert best == (tmp_path / "step-00000002", 2.0)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_one_that_is_written_at_a_spike_displaces_none(ranks, tmp_path):
    spiking = [replace(state(step), spikes=SpikeState((2.0,), (1.0,), in_a_row)) for step, in_a_row in ((3, 1), (4, 2))]
    ranks.run(save_states, tmp_path, RetentionPolicy(1), state(2), *spiking, size=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    ranks.run(save_states, tmp_path, RetentionPolicy(1), state(5), size=2)
    assert names(tmp_path) == ["step-00000005"]


def test_one_of_the_same_step_is_replaced(ranks, tmp_path):
    ranks.run(save, tmp_path, 5, size=2)
    ranks.run(save_another, tmp_path, size=2)
    assert ranks.run(read_all, tmp_path / "step-00000005", size=2) == [8.0, 8.0]
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize(("checks", "left"), [(0, []), (1, []), (2, ["step-00000001"]), (3, ["step-00000001"])])
def test_a_run_that_may_not_write_any_more_changes_nothing(ranks, tmp_path, checks, left):
    """Its lock was found lost before anything was written, or before what was written got its name."""
    messages = ranks.run(save_without_lock, tmp_path, checks, size=2)
    assert messages[0] == messages[1]
    assert re.search(
        r"step-0000000\d could not be written: the lock is another's\. Earlier checkpoints are", messages[0]
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == left


def save_without_lock(folder: Path, checks: int) -> str:
    """On a rank: save until the lock is lost, which that many checks do not find yet."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls > checks:
            raise UserError("the lock is another's")

    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0, check=check)
    for step in (1, 2):
        checkpointer.save(sharded(step), state(step))
        try:
            checkpointer.wait()
        except UserError as error:
            checkpointer.close()
            return str(error)
    raise AssertionError("it was saved")


def save_another(folder: Path) -> None:
    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0)
    checkpointer.save(sharded(8.0), state(5))
    checkpointer.close()


def test_what_a_killed_run_left_is_removed_by_the_next_save(ranks, tmp_path):
    left = tmp_path / "step-00000004.partial"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    ranks.run(save, tmp_path, 3, size=2)
    assert names(tmp_path) == ["step-00000003"]


# Writers that are stopped


CHANGES = [(Path, "rename"), (Path, "write_text"), (FileSystem, "create_stream"), (os, "unlink"), (os, "rmdir")]


def killed_at_each_change(folder: Path) -> int:
    """Save over one of the same step, with old ones to remove, stopped before the n-th change to the disk for each n;
    what is left has to be whole. Returns how many points there were."""
    for point in range(1000):
        here = folder / str(point)
        save(here, 1, 2, 3)
        if not stopped_before(point, partial(save, here, 3, keep=1), CHANGES):
            assert names(here) == ["step-00000003"]
            return point
        found = list_checkpoints(here)
        assert found, names(here)
        for path in found:
            assert read_state(path).step == read_all(path)
        save(here, 4)
        assert names(here)[-1] == "step-00000004"
        assert not list(here.glob("*.partial"))
    raise AssertionError("it never ends")


def test_a_run_killed_at_any_point_leaves_whole_checkpoints(ranks, tmp_path):
    (points,) = ranks.run(killed_at_each_change, tmp_path, size=1)
    assert points >= 12  # 2 files, trainer.json, 3 renames, and the files of 2 folders


class FullDisk(io.BytesIO):
    """A file on a disk with 640 bytes left. That the first ones can be written matters: what torch says when others
    cannot be is `unexpected pos 704 vs 598`."""

    def write(self, data: bytes | memoryview) -> int:
        if self.tell() + len(data) > 640:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@contextmanager
def no_space_on_rank_1() -> Iterator[None]:
    stream = FileSystem.create_stream

    def on_a_full_disk(self, path, mode):
        return nullcontext(FullDisk()) if dist.get_rank() == 1 else stream(self, path, mode)

    with patch.object(FileSystem, "create_stream", on_a_full_disk):
        yield


@contextmanager
def no_space_for_the_last_file() -> Iterator[None]:
    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with patch.object(Path, "write_text", full):
        yield


@contextmanager
def files_of_rank_1_elsewhere() -> Iterator[None]:
    """As on machines without a file system that they share."""
    stream = FileSystem.create_stream

    def elsewhere(self, path, mode):
        return stream(self, "/dev/null" if dist.get_rank() == 1 else path, mode)

    with patch.object(FileSystem, "create_stream", elsewhere), patch("os.fsync"):
        yield


def failing_save(folder: Path, cause: Callable[[], AbstractContextManager[None]]) -> str:
    """Save 1, fail to save 2 for a `cause`, save 3; the message."""
    save(folder, 1)
    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0)
    with cause():
        checkpointer.save(sharded(2), state(2))
        with pytest.raises(UserError) as caught:
            checkpointer.wait()
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000001"]
    assert read_all(folder / "step-00000001") == 1.0
    checkpointer.save(sharded(3), state(3))
    checkpointer.close()
    return str(caught.value)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (no_space_on_rank_1, "rank 1: [Errno 28] No space left on device"),
        (no_space_for_the_last_file, "[Errno 28] No space left on device"),
        (files_of_rank_1_elsewhere, "rank 0 does not see __1_0.distcp, which other ranks wrote"),
    ],
)
def test_what_cannot_be_written_is_an_error_on_every_rank_and_harms_nothing(ranks, tmp_path, cause, reason):
    messages = ranks.run(failing_save, tmp_path, cause, size=2)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"checkpoint {tmp_path}/step-00000002 could not be written: {reason}")
    assert "Earlier checkpoints are unchanged" in messages[0]
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_failed_save_is_reported_by_the_next_one(ranks, tmp_path):
    ranks.run(fail_at_the_next_save, tmp_path, size=2)


def fail_at_the_next_save(folder: Path) -> None:
    checkpointer = Checkpointer(folder, RetentionPolicy(2), timeout=20.0)
    with no_space_on_rank_1():
        checkpointer.save(sharded(2), state(2))
        wait([future for future, _ in checkpointer._pending])
        dist.barrier()
        with pytest.raises(UserError, match="step-00000002 could not be written"):
            checkpointer.save(sharded(3), state(3))
    checkpointer.close()

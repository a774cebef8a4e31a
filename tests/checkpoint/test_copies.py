"""Copies of checkpoints in a store without renames: complete or absent, whatever stops the run that makes them."""

import os
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from longctx.checkpoint.copies import CheckpointCopies
from longctx.checkpoint.retention import RetentionPolicy
from longctx.checkpoint.save import Checkpointer
from longctx.errors import UserError
from tests.checkpoint.saving import measured, names, read_all, save, sharded, state, stopped_before


def copies_in(folder: Path, run: str = "mine") -> CheckpointCopies:
    copies = CheckpointCopies(f"file://{folder / 'store'}")
    if not dist.is_initialized() or dist.get_rank() == 0:
        copies.claim(run)
    return copies


def save_with_copies(folder: Path, retention: RetentionPolicy, *states) -> str | None:
    """On a rank: save `sharded(step)` with each state and copy it; why the last was not copied."""
    checkpointer = Checkpointer(folder / "checkpoints", retention, timeout=20.0, copies=copies_in(folder))
    for each in states:
        checkpointer.save(sharded(each.step), each)
    checkpointer.close()
    return checkpointer.not_copied


def read_copy(folder: Path, step: int) -> float:
    """The value with which a copy was saved, once all of it was downloaded and read."""
    copies, here = copies_in(folder), folder / "downloaded" / f"step-{step:08d}"
    here.mkdir(parents=True)
    copies.download(step, [*copies.listing(step)["files"], "trainer.json"], here)
    return read_all(here)


@pytest.mark.parametrize("size", [1, 3])
def test_a_copy_has_every_file_of_every_rank(ranks, tmp_path, size):
    assert ranks.run(save_with_copies, tmp_path, RetentionPolicy(2), state(3), size=size) == [None] * size
    assert names(tmp_path / "store") == ["run.json", "step-00000003"]
    assert names(tmp_path / "store" / "step-00000003") == names(tmp_path / "checkpoints" / "step-00000003")
    assert ranks.run(read_copy, tmp_path, 3, size=1) == [3.0]


def test_the_same_ones_are_kept_as_in_the_directory(ranks, tmp_path):
    retention = RetentionPolicy(1, every=4, sequences=8)
    states = state(2), state(4), measured(5, 2.0), measured(6, 3.0), state(7)
    ranks.run(save_with_copies, tmp_path, retention, *states, size=2)
    assert copies_in(tmp_path).steps() == [4, 5, 7]
    assert names(tmp_path / "checkpoints") == ["step-00000004", "step-00000005", "step-00000007"]


def test_those_of_an_attempt_that_was_given_up_are_removed(ranks, tmp_path):
    ranks.run(save_with_copies, tmp_path, RetentionPolicy(5), state(1), state(2), state(3), size=2)
    ranks.run(save_with_copies, tmp_path, RetentionPolicy(5), state(2), size=2)
    assert copies_in(tmp_path).steps() == [1, 2]


CHANGES = [(LocalFileSystem, name) for name in ("put_file", "pipe_file", "rm_file")] + [(os, "unlink")]


def killed_at_each_change(folder: Path) -> int:
    """Copy over one of the same step, with an old one to remove, stopped before the n-th change to the store for each
    n; what counts as complete has to be. Returns how many points there were."""
    local = folder / "checkpoints"
    save(local, 1, 2, 3, keep=3)
    for point in range(100):
        copies = copies_in(folder / str(point))
        for step in (1, 2, 3):
            make_copy(copies, local, step, RetentionPolicy(3))
        if not stopped_before(point, partial(make_copy, copies, local, 2, RetentionPolicy(1)), CHANGES):
            assert copies.steps() == [2]
            return point
        for step in copies.steps():
            assert read_copy(folder / str(point), step) == step
        make_copy(copies, local, 3, RetentionPolicy(1))
        assert names(folder / str(point) / "store") == ["run.json", "step-00000003"]
    raise AssertionError("it never ends")


def make_copy(copies: CheckpointCopies, local: Path, step: int, retention: RetentionPolicy) -> None:
    path = local / f"step-{step:08d}"
    copies.begin(step)
    copies.upload(path, [name for name in names(path) if name != "trainer.json"])
    copies.publish(path)
    copies.retain(retention)


def test_a_run_killed_at_any_point_leaves_whole_copies(ranks, tmp_path):
    (points,) = ranks.run(killed_at_each_change, tmp_path, size=1)
    assert points >= 10  # a listing and 2 files that are removed, twice; 2 files and a listing that are written


def test_a_file_that_did_not_arrive_whole_makes_no_copy(ranks, tmp_path):
    ranks.run(save, tmp_path / "checkpoints", 1, size=2)
    path, copies = tmp_path / "checkpoints" / "step-00000001", copies_in(tmp_path)
    copies.upload(path, ["__0_0.distcp", ".metadata"])
    with pytest.raises(UserError, match=r"step-00000001/__1_0\.distcp has 0 bytes, not \d+"):
        copies.publish(path)
    assert copies.steps() == []


def fail_and_go_on(folder: Path) -> list[str | None]:
    """Save 1 into a store that is full, and 2 into one that is not; what is said of each copy."""
    checkpointer = Checkpointer(folder / "checkpoints", RetentionPolicy(2), timeout=20.0, copies=copies_in(folder))
    said = []
    with patch.object(LocalFileSystem, "put_file", side_effect=OSError(28, "No space left on device")):
        checkpointer.save(sharded(1), state(1))
        checkpointer.wait()
        said.append(checkpointer.not_copied)
    checkpointer.save(sharded(2), state(2))
    checkpointer.close()
    return [*said, checkpointer.not_copied]


def test_a_copy_that_fails_does_not_end_the_run(ranks, tmp_path):
    for first, second in ranks.run(fail_and_go_on, tmp_path, size=2):
        assert first.startswith(f"checkpoint {tmp_path}/checkpoints/step-00000001 was not copied: rank 0: file://")
        assert "No space left on device" in first
        assert "The checkpoint itself is complete" in first
        assert second is None
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]
    assert copies_in(tmp_path).steps() == [2]


def copy_missing(folder: Path, step: int) -> str | None:
    checkpointer = Checkpointer(folder / "checkpoints", RetentionPolicy(2), timeout=20.0, copies=copies_in(folder))
    checkpointer.copy_missing(folder / "checkpoints" / f"step-{step:08d}", state(step))
    checkpointer.close()
    return checkpointer.not_copied


def test_what_the_last_start_did_not_copy_is_copied_by_the_next(ranks, tmp_path):
    ranks.run(save, tmp_path / "checkpoints", 1, 2, size=2)
    assert ranks.run(copy_missing, tmp_path, 2, size=2) == [None, None]
    assert copies_in(tmp_path).steps() == [2]
    before = (tmp_path / "store" / "step-00000002" / "trainer.json").stat().st_mtime_ns
    ranks.run(copy_missing, tmp_path, 2, size=2)
    assert (tmp_path / "store" / "step-00000002" / "trainer.json").stat().st_mtime_ns == before


def test_a_run_whose_copies_another_one_has_claimed_adds_none(ranks, tmp_path):
    mine, _ = copies_in(tmp_path), copies_in(tmp_path, "theirs")
    with pytest.raises(UserError, match="claimed by another run"):
        mine.begin(1)


def test_a_listing_that_leads_out_of_the_checkpoint_is_refused(tmp_path):
    copies, folder = copies_in(tmp_path), tmp_path / "store" / "step-00000001"
    folder.mkdir()
    (folder / "trainer.json").write_text('{"files": {"../../secret": 3}}')
    with pytest.raises(UserError, match="lists files outside of the checkpoint"):
        copies.listing(1)


@pytest.mark.parametrize(
    ("url", "message"),
    [("nowhere://bucket/mine", "Protocol not known: nowhere"), ("abfs://container/mine", "Install adlfs")],
)
def test_a_store_that_cannot_be_reached_is_named_with_the_reason(url, message):
    with pytest.raises(UserError, match=f"{url}: .*{message}"):
        CheckpointCopies(url)

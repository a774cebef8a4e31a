"""Sharded checkpoint storage: the listing finds damage, and regions of tensors are read in one process."""

import os
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from longctx.checkpoint.checksums import unseal
from longctx.checkpoint.lazy_tensors import LazyTensor, write_lazy
from longctx.checkpoint.storage import (
    Reader,
    RegionPlanner,
    Writer,
    describe_failures,
    find_damage,
    read_tensors,
    write_listing,
)
from longctx.errors import UserError

VALUE = torch.arange(24.0).view(6, 4)


@pytest.fixture
def folder(tmp_path):
    """A folder with a 6x4 tensor in shards of 4 rows."""
    write_lazy(tmp_path, {"w": LazyTensor(VALUE.shape, lambda begin, end: VALUE[begin:end], rows=4)})
    return tmp_path


def listed(folder):
    return unseal((folder / "listing.json").read_text())


def test_the_listing_has_the_content_and_the_size_of_every_other_file(tmp_path):
    for name, content in {"b.distcp": b"12345", "a.json": b"{}", ".metadata": b"123", ".lock": b""}.items():
        (tmp_path / name).write_bytes(content)
    write_listing(tmp_path, "listing.json", {"step": 7}, {"a.json": "00000001"})
    files = {"a.json": 2, "b.distcp": 5, ".metadata": 3}
    assert listed(tmp_path) == {"step": 7, "files": files, "checksums": {"a.json": "00000001"}}
    # Again, over itself.
    write_listing(tmp_path, "listing.json", {"step": 8}, {})
    assert listed(tmp_path) == {"step": 8, "files": files, "checksums": {}}


def test_intact_files_have_no_damage(folder):
    write_listing(folder, "listing.json", {}, {})
    assert find_damage(folder, listed(folder)["files"]) is None


def test_the_first_file_that_is_truncated_or_missing_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"12")
    (tmp_path / "folder").mkdir()
    assert find_damage(tmp_path, {"a": 3, "b": 4, "c": 1}) == "b has 2 bytes, expected 4 bytes"
    assert find_damage(tmp_path, {"a": 3, "c": 1, "b": 4}) == "c is missing, expected 1 bytes"
    assert find_damage(tmp_path, {"folder": 1}) == "folder is missing, expected 1 bytes"


def test_one_process_reads_a_tensor_from_its_shards_without_a_warning(folder):
    got = {"w": torch.empty(6, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_tensors(folder, got)
    assert torch.equal(got["w"], VALUE)


@pytest.mark.parametrize(("begin", "rows"), [(0, 2), (3, 3), (5, 1), (0, 6)])
def test_rows_are_read_from_an_offset_over_the_ends_of_shards(folder, begin, rows):
    got = {"w": torch.empty(rows, 4)}
    read_tensors(folder, got, planner=RegionPlanner(begin))
    assert torch.equal(got["w"], VALUE[begin : begin + rows])


def test_a_region_may_have_an_offset_in_every_dimension(folder):
    got = {"w": torch.empty(3, 2)}
    read_tensors(folder, got, planner=RegionPlanner(2, 1))
    assert torch.equal(got["w"], VALUE[2:5, 1:3])


def test_metadata_is_read_once_per_reader(folder):
    reader, first, second = Reader(folder), {"w": torch.empty(6, 4)}, {"w": torch.empty(6, 4)}
    read_tensors(folder, first, reader)
    os.remove(folder / ".metadata")
    read_tensors(folder, second, reader)
    assert torch.equal(second["w"], VALUE)


def test_a_missing_tensor_is_a_user_error_with_the_path_and_the_reason(folder):
    with pytest.raises(UserError, match=f"^{folder} cannot be read: rank 0: .*other"):
        read_tensors(folder, {"other": torch.empty(2)})


def test_failures_are_described_by_rank():
    failures = {3: (ValueError("disk"), None), 1: (OSError("network"), None)}
    assert describe_failures(CheckpointException("failed", failures)) == "rank 1: network; rank 3: disk"


def test_the_writer_raises_the_os_error_behind_a_runtime_error(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")

    def write_data(self, plan, planner):
        try:
            raise full
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 - as torch's serialization does

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)
    with pytest.raises(OSError, match="No space left") as caught:
        Writer(tmp_path).write_data(None, None)
    assert caught.value is full


def test_the_writer_leaves_other_runtime_errors(tmp_path, monkeypatch):
    def write_data(self, plan, planner):
        raise RuntimeError("something else")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write_data)
    with pytest.raises(RuntimeError, match="something else"):
        Writer(tmp_path).write_data(None, None)

"""Durable writes: files and folders are synced, no descriptor stays open, and a full disk is a plain error."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from longctx import files
from longctx.errors import UserError
from longctx.files import absolute, path_errors, replace_file, sync, temporary_folder, writing


@pytest.fixture
def synced(monkeypatch):
    """The inodes of what is synced."""
    inodes = []
    fsync = os.fsync

    def recorded(descriptor):
        inodes.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", recorded)
    return inodes


def descriptors():
    return sorted(os.listdir("/dev/fd"))


def test_a_file_and_the_entries_of_a_folder_are_synced(tmp_path, synced):
    (tmp_path / "a").write_text("text")
    before = descriptors()
    sync(tmp_path / "a")
    sync(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
    assert descriptors() == before


def test_the_content_stays(tmp_path):
    (tmp_path / "a").write_text("text")
    sync(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "text"


def test_a_failed_sync_is_raised_and_the_descriptor_is_closed(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(5, "Input/output error")

    (tmp_path / "a").write_text("text")
    before = descriptors()
    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path / "a")
    assert descriptors() == before


def test_a_missing_file_is_not_created(tmp_path):
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_is_an_error_that_names_the_file(tmp_path):
    named = pytest.raises(UserError, match=r"recipe\.toml cannot be written: No space left on device")
    with open("/dev/full", "wb", buffering=0) as full, named, writing(tmp_path / "recipe.toml"):
        full.write(b"name")


def test_another_error_of_the_block_stays_as_it_is(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError


def test_a_temporary_folder_that_cannot_be_made_is_an_error_that_names_tmpdir(tmp_path, monkeypatch):
    with temporary_folder("job") as folder:
        assert folder.is_dir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"No such file or directory.* Set TMPDIR to a folder"), temporary_folder("job"):
        pass


@pytest.mark.parametrize(
    "kind", [errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.ENOTDIR, errno.EROFS, errno.ENOSPC]
)
def test_what_only_the_user_can_fix_is_an_error_with_the_path(kind):
    reason = os.strerror(kind)
    with pytest.raises(UserError, match=f"^a/b: {reason}$"), path_errors():
        raise OSError(kind, reason, "a/b")
    with pytest.raises(UserError, match=rf"^x{{80}}… \(5,000 characters\): {reason}$"), path_errors():
        raise OSError(kind, reason, b"x" * 5000)


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "bad", "a"), OSError(errno.ENOSPC, "full"), KeyError("a")])
def test_other_errors_are_not_taken_for_the_users(error):
    with pytest.raises(type(error)) as caught, path_errors():
        raise error
    assert caught.value is error


def test_a_path_is_absolute_and_a_home_is_expanded_if_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("~/a") == Path("/home/me/a")
    assert absolute("~no-such-user/a") == tmp_path / "~no-such-user" / "a"
    assert absolute(Path("b/../c")) == tmp_path / "c"


def test_a_file_is_replaced_as_a_whole(tmp_path, synced, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")
    assert synced == [path.stat().st_ino], "synced before it gets its name"

    def crash(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", crash)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"

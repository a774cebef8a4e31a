"""Locks of folders: held by a live owner, free after it, and nothing is said of what is not this user's folder."""

import os

import pytest

from longctx.parallel import folder_lock
from longctx.parallel.folder_lock import LOCK, abandoned, lock_folder, remove_locked


def test_a_lock_is_held_until_its_owner_closes_it(tmp_path):
    lock = lock_folder(tmp_path, "content")
    with pytest.raises(BlockingIOError), abandoned(tmp_path):
        pass
    os.close(lock)
    with abandoned(tmp_path) as content:
        assert content == "content"
        with pytest.raises(BlockingIOError), abandoned(tmp_path):
            pass
    assert os.listdir(tmp_path) == [LOCK]


def test_a_lock_that_was_replaced_while_it_was_taken_is_not_held(tmp_path, monkeypatch):
    os.close(lock_folder(tmp_path))
    flock = folder_lock.fcntl.flock

    def replaced(lock, how):
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).touch()
        flock(lock, how)

    monkeypatch.setattr(folder_lock.fcntl, "flock", replaced)
    with pytest.raises(FileNotFoundError, match="was replaced"), abandoned(tmp_path):
        pass


def test_what_is_not_this_users_locked_folder_is_not_known(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError), abandoned(tmp_path):
        pass
    os.close(lock_folder(tmp_path))
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError), abandoned(link):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="another user's"), abandoned(tmp_path):
        pass


def test_a_folder_is_removed_with_all_that_is_in_it(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "file").touch()
    (folder / "link").symlink_to(outside)
    os.close(lock_folder(folder))
    remove_locked(folder)
    assert not folder.exists()
    assert (outside / "file").exists()

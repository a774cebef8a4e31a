"""A job's private folder: nobody else reads it, and the next job removes it if its own was killed."""

import os
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from longctx.parallel import folder_lock, one_machine
from longctx.parallel.one_machine import job_folder
from tests.e2e.jobs import ROOT


@pytest.fixture(autouse=True)
def parent(tmp_path, monkeypatch):
    """The folder of temporary files, of the tests and of what they start."""
    folder = tmp_path / "parent"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def start(code: str, parent: Path) -> subprocess.Popen[str]:
    """A process inside a `job_folder`, which it prints; with `folder` in reach of `code`."""
    body = "from longctx.parallel.one_machine import job_folder\nimport os, signal, sys\n"
    body += "with job_folder('job') as folder:\n    (folder / 'data' / 'deep').mkdir(parents=True)\n"
    body += "    (folder / 'data' / 'file').touch()\n    print(folder, flush=True)\n" + textwrap.indent(code, "    ")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(parent)}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", body], env=environment, text=True, **streams)


def killed(parent: Path) -> Path:
    """The folder of a job that was killed."""
    process = start("os.kill(os.getpid(), signal.SIGKILL)", parent)
    folder = Path(process.communicate(timeout=60)[0].strip())
    assert (folder / "data" / "file").exists()
    return folder


def test_it_is_private_and_gone_after_the_job(parent):
    with job_folder("job") as folder:
        assert folder.parent == parent
        assert folder.name.startswith("longctx-job-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "inside").mkdir()
    assert not folder.exists()
    with pytest.raises(KeyError), job_folder("job"):
        raise KeyError
    assert os.listdir(parent) == []


def test_the_next_job_removes_that_of_a_killed_one(parent):
    leftover = killed(parent)
    with job_folder("ranks") as folder:
        assert os.listdir(parent) == [folder.name]
        assert not leftover.exists()


def test_a_live_job_keeps_its_own(parent):
    process = start("sys.stdin.read()", parent)
    folder = Path(process.stdout.readline().strip())
    with job_folder("job"), job_folder("job"):
        assert len(os.listdir(parent)) == 3
        assert (folder / "data" / "file").exists()
    process.communicate("", timeout=60)
    assert process.returncode == 0
    assert os.listdir(parent) == []


def test_a_child_that_outlives_its_job_keeps_it(parent):
    process = start("if os.fork():\n    os.kill(os.getpid(), signal.SIGKILL)\nsys.stdin.read(); os._exit(0)", parent)
    folder = Path(process.stdout.readline().strip())
    process.wait(timeout=60)
    with job_folder("job"):
        assert folder.exists()
    process.stdin.close()
    assert process.stdout.read() == ""  # the child's end
    with job_folder("job"):
        assert not folder.exists()


def test_what_is_not_certainly_a_dead_jobs_stays(parent, tmp_path):
    for name in ("longctx-notes", "longctx-empty/.lock.draft", "other-job"):
        (parent / name).mkdir(parents=True)
    (parent / "longctx-unlocked").mkdir()
    (parent / "longctx-unlocked" / "data").touch()
    (parent / "longctx-file").touch()
    # Another machine's, or from before this one booted: a lock says nothing about it.
    (killed(parent) / ".lock").write_text("00000000-0000-0000-0000-000000000000")
    # A link of that name to a folder elsewhere.
    linked, target = killed(parent), tmp_path / "target"
    linked.rename(target)
    linked.symlink_to(target)
    before = sorted(os.listdir(parent))
    with job_folder("job"):
        pass
    assert sorted(os.listdir(parent)) == before
    assert (target / "data" / "file").exists()


def test_another_users_stays(parent, monkeypatch):
    leftover = killed(parent)
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.os, "geteuid", lambda: os.getuid() + 1)
        with job_folder("job"):
            assert leftover.exists()
    with job_folder("job"):
        assert not leftover.exists()


def test_a_folder_is_locked_before_another_start_can_take_its_lock(parent, monkeypatch):
    """Another start at every moment of a start finds either no lock or one that is taken."""
    seen = []
    flock = folder_lock.fcntl.flock

    def other_start(*arguments):
        one_machine._remove_leftovers(parent)
        seen.append(sorted(path.name for path in parent.glob("*/*")))

    def before_and_after(lock, how):
        if how == folder_lock.fcntl.LOCK_EX:
            other_start()
        flock(lock, how)

    rename = Path.rename

    def around(source, target):
        other_start()
        rename(source, target)
        other_start()

    monkeypatch.setattr(folder_lock.fcntl, "flock", before_and_after)
    monkeypatch.setattr(Path, "rename", around)
    with job_folder("job") as folder:
        assert folder.exists()
    assert seen == [[".lock.draft"], [".lock.draft"], [".lock"]]


def test_a_removal_that_is_interrupted_is_completed_by_the_next_start(parent, monkeypatch):
    leftover = killed(parent)
    with monkeypatch.context() as patch:
        patch.setattr(folder_lock.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), job_folder("job"):
            pass
    assert (leftover / ".lock").exists()
    with job_folder("job"):
        assert not leftover.exists()


def test_starts_at_the_same_time_do_not_disturb_each_other(parent):
    leftovers = [killed(parent) for _ in range(3)]
    processes = [start("", parent) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert not any(leftover.exists() for leftover in leftovers)
    assert os.listdir(parent) == []

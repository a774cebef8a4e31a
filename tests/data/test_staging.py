"""A prepared directory is complete or absent, whatever ends the run."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from longctx.data import staging
from longctx.errors import UserError
from longctx.parallel.folder_lock import remove_locked
from tests.data.cases import prepared, texts, write_tree


@pytest.fixture
def folder(tmp_path):
    return write_tree(tmp_path / "in", {f"{n}.txt": f"text {n}" for n in range(50)})


def run(code, *arguments):
    """Start Python on `code`, with prepare imported and no bar."""
    prelude = """
        import os, signal, sys
        from longctx.data import encode, prepare as module, shards, staging
        if __name__ == "__main__":
    """
    body = textwrap.indent(textwrap.dedent(code), "    ")
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(prelude) + body, *map(str, arguments)])


def test_a_killed_run_leaves_nothing_that_looks_whole(folder, tmp_path):
    code = """
        module.Manifest.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        module.prepare([sys.argv[1]], sys.argv[2], shard_tokens=20, progress=False)
    """
    assert run(code, folder, tmp_path / "out").wait(timeout=60) == -signal.SIGKILL
    (partial,) = tmp_path.glob("out*")
    assert partial.name.startswith("out.partial-")
    assert any(partial.glob("train/*.parquet"))
    prepared([folder], tmp_path / "out")
    assert len(texts(tmp_path / "out")) == 50
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train"]


def test_workers_end_with_a_killed_run(folder, tmp_path):
    code = """
        module._jobs = lambda batch: sys.argv[3]
        encode._work = eval
        module.prepare([sys.argv[1]], sys.argv[2], workers=2, progress=False)
    """
    # A worker writes its number and then works for ever.
    work = (
        f"open({str(tmp_path)!r} + '/worker', 'w').write(str(__import__('os').getpid())) + __import__('time').sleep(99)"
    )
    process = run(code, folder, tmp_path / "out", work)
    deadline = time.monotonic() + 60
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = psutil.Process(int((tmp_path / "worker").read_text()))
    process.kill()
    process.wait()
    try:
        worker.wait(timeout=10)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def test_what_exists_is_not_touched(folder, tmp_path):
    prepared([folder], tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"out already exists.*--overwrite"):
        prepared([folder], tmp_path / "out")
    bad = write_tree(tmp_path / "bad", {"a": b"\xff"})
    with pytest.raises(UserError, match="invalid UTF-8"):
        prepared([bad], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["bad", "in", "out"]


def test_overwrite_replaces_a_corpus_and_nothing_else(folder, tmp_path):
    prepared([folder], tmp_path / "out")
    other = write_tree(tmp_path / "other", {"a": "new"})
    prepared([other], tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == {"other/a": "new"}
    assert sorted(os.listdir(tmp_path)) == ["in", "other", "out"]
    write_tree(tmp_path / "thesis", {"chapter.tex": "years of work"})
    with pytest.raises(UserError, match=r"thesis is not a prepared corpus.*not be replaced"):
        prepared([other], tmp_path / "thesis", overwrite=True)
    with pytest.raises(UserError, match="would be replaced"):
        prepared([tmp_path / "out" / "manifest.json"], tmp_path / "out", overwrite=True)
    (tmp_path / "empty").mkdir()
    prepared([other], tmp_path / "empty")
    assert texts(tmp_path / "empty") == {"other/a": "new"}


def test_a_failed_replacement_puts_the_old_corpus_back(folder, tmp_path, monkeypatch):
    prepared([folder], tmp_path / "out")
    rename = staging.Path.rename

    def fail_once(source, goal):
        if ".partial-" in source.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, goal)

    monkeypatch.setattr(staging.Path, "rename", fail_once)
    with pytest.raises(UserError, match=r"out: cannot be written: Input/output error"):
        prepared([write_tree(tmp_path / "other", {"a": "new"})], tmp_path / "out", overwrite=True)
    assert len(texts(tmp_path / "out")) == 50
    assert sorted(os.listdir(tmp_path)) == ["in", "other", "out"]


def test_two_runs_do_not_share_a_target(folder, tmp_path):
    with staging.staging(tmp_path / "out") as partial:
        with pytest.raises(UserError, match=rf"another run is writing .*out \(in {partial.name}\)"):
            prepared([folder], tmp_path / "out")
        assert partial.is_dir()


def test_only_what_a_dead_run_left_is_removed(folder, tmp_path):
    write_tree(tmp_path, {"out.partial-dead/.lock": "", "out.partial-dead/train/x": "", "out.partial-notes/mine": "x"})
    (tmp_path / "out.partial-young").mkdir()
    prepared([folder], tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "out.partial-notes"]


KILLED = {
    "between the renames": """
        rename = staging.Path.rename
        def rename_or_die(source, goal):
            if source.name.startswith("out.partial-"):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(source, goal)
        staging.Path.rename = rename_or_die
    """,
    "while it removed the old corpus": """
        from longctx.parallel import folder_lock
        folder_lock.shutil.rmtree = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    """,
}


@pytest.mark.parametrize("when", KILLED)
def test_a_run_that_was_killed_replacing_a_corpus_leaves_one_and_the_next_removes_the_rest(folder, tmp_path, when):
    prepared([folder], tmp_path / "out")
    other = write_tree(tmp_path / "other", {"a": "new"})
    replace = "module.prepare([sys.argv[1]], sys.argv[2], progress=False, overwrite=True)"
    assert run(f"{textwrap.dedent(KILLED[when])}\n{replace}", other, tmp_path / "out").wait(60) == -signal.SIGKILL
    (old,) = tmp_path.glob("out.replaced-*")
    assert (tmp_path / "out").exists() == (when != "between the renames")
    # A run that fails puts the old corpus back, if there is none.
    with pytest.raises(UserError, match="invalid UTF-8"):
        prepared([write_tree(tmp_path / "bad", {"a": b"\xff"})], tmp_path / "out", overwrite=True)
    assert not old.exists()
    assert len(texts(tmp_path / "out")) == (50 if when == "between the renames" else 1)
    prepared([other], tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == {"other/a": "new"}
    assert sorted(os.listdir(tmp_path)) == ["bad", "in", "other", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "train"]


def test_a_corpus_that_a_live_run_is_replacing_is_left_to_it(folder, tmp_path, monkeypatch):
    prepared([folder], tmp_path / "out")
    told = []

    def another_start(old):
        with pytest.raises(UserError, match=r"another run is writing .*out \(in out.replaced-\w+\)"):
            prepared([folder], tmp_path / "out", overwrite=True)
        told.append(len(texts(old)))
        remove_locked(old)

    monkeypatch.setattr(staging, "remove_locked", another_start)
    prepared([write_tree(tmp_path / "other", {"a": "new"})], tmp_path / "out", overwrite=True)
    assert told == [50]
    assert sorted(os.listdir(tmp_path)) == ["in", "other", "out"]


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_a_link_and_another_users_folder_stay(folder, tmp_path, monkeypatch, kind):
    target = write_tree(tmp_path / "target", {".lock": "", "mine": "x"})
    (tmp_path / f"out.{kind}-link").symlink_to(target)
    prepared([folder], tmp_path / "out")
    write_tree(tmp_path, {f"out.{kind}-theirs/.lock": "", f"out.{kind}-theirs/data": "x"})
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    prepared([folder], tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(target)) == [".lock", "mine"]
    assert sorted(os.listdir(tmp_path / f"out.{kind}-theirs")) == [".lock", "data"]


def test_a_folder_that_another_start_took_for_a_leftover_is_made_again(folder, tmp_path, monkeypatch):
    """Killed runs leave empty folders, and so does, for a moment, one that starts."""
    mkdir, taken = staging.Path.mkdir, []

    def made_and_taken(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        if path.name.startswith("out.partial-") and not taken:
            taken.append(path.name)
            staging._clear_leftovers(tmp_path / "out")
            assert not path.exists()

    monkeypatch.setattr(staging.Path, "mkdir", made_and_taken)
    prepared([folder], tmp_path / "out")
    assert taken
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_full_disk_is_named_and_leaves_nothing(folder, tmp_path):
    # The kernel refuses a write beyond this size as it refuses one on a full disk.
    code = """
        import resource
        from longctx.errors import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            module.prepare([sys.argv[1]], sys.argv[2], progress=False)
        except UserError as error:
            assert "shard-00000.parquet: cannot be written" in str(error), error
            sys.exit(7)
    """
    (folder / "big.txt").write_bytes("".join(map(chr, range(32, 20000))).encode())
    assert run(code, folder, tmp_path / "out").wait(timeout=60) == 7
    assert os.listdir(tmp_path) == ["in"]


def test_a_full_disk_says_how_much_is_free(tmp_path):
    with (
        pytest.raises(
            UserError, match=r"shard: cannot be written: No space left on device \(\d+ MB free\); free some space"
        ),
        staging.naming_disk_errors(tmp_path / "train" / "shard"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_the_lock_is_held_until_the_end(tmp_path):
    with staging.staging(tmp_path / "out") as partial, open(partial / ".lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

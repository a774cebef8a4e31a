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

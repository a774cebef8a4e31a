"""Ranks that hang: the one that does not come is named, on one machine and in a job of a cluster, and the job ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.jobs import ROOT, Job
from tests.train.runs import write_workplace

OVERRIDES = ("train.steps=100000", "checkpoint.every=100000", "parallel.timeout=16s")
SILENT = (
    r"\(process {pid} on .+\) has not reported for \d+ s: its process is stopped, or its machine does not answer\. "
)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return write_workplace(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named(workplace: Path, stopped: int) -> None:
    job = Job(workplace, *OVERRIDES)
    job.wait_for_step(3)
    ranks = job.ranks()
    os.kill(ranks[stopped], signal.SIGSTOP)
    status, _, stderr = job.wait()
    assert status == 1
    assert re.match(rf"error: rank {stopped} {SILENT.format(pid=ranks[stopped])}Its last report: ", stderr)
    assert f"rank {1 - stopped} waits in step " in stderr
    assert "Stacks of the ranks that answer: out/logs/rank-*.stacks. --resume auto continues" in stderr
    assert [path.name for path in (workplace / "out" / "logs").glob("*.stacks")] == [f"rank-{1 - stopped}.stacks"]


@pytest.mark.slow
def test_if_all_ranks_are_stopped_the_launcher_says_so(workplace: Path) -> None:
    job = Job(workplace, *OVERRIDES)
    job.wait_for_step(3)
    ranks = job.ranks()
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    status, _, stderr = job.wait()
    assert status == 1
    assert re.match(
        rf"error: No rank reports any more\. The last to report: rank [01] \(process {'|'.join(map(str, ranks))} on ",
        stderr,
    )
    assert "Stacks" not in stderr


@pytest.mark.slow
def test_a_rank_that_never_arrives_is_named_with_where_it_is(workplace: Path, monkeypatch) -> None:
    monkeypatch.setenv("SIGNALLED_STEP", "5")
    job = Job(workplace, *OVERRIDES, entry="signalled_in_a_step")
    status, _, stderr = job.wait()
    assert status == 1
    assert re.match(r"error: rank 1 \(process \d+ on .+\) did not arrive within 13 s: step 5, at longctx\.", stderr)
    assert "rank 0 waits in step 5, " in stderr


@pytest.fixture
def cluster(workplace: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks with the variables that torchrun or a cluster sets, which no launcher watches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    common |= {"LOCAL_RANK": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longctx", "train", "tiny.toml", *OVERRIDES, "--out", "out"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": workplace}
    ranks = [subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank)}, **pipes) for rank in range(2)]
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.wait()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_without_a_launcher_the_ranks_find_it(workplace: Path, cluster, stopped: int) -> None:
    """Rank 0 holds the rendezvous store: if it is stopped, nobody's reports can be read."""
    metrics = workplace / "out" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert all(rank.poll() is None for rank in cluster)
    cluster[stopped].send_signal(signal.SIGSTOP)
    _, stderr = cluster[1 - stopped].communicate(timeout=60)
    assert cluster[1 - stopped].returncode == 1
    said = (
        rf"rank 1 {SILENT.format(pid=cluster[1].pid)}"
        if stopped
        else r"step \d+: the rendezvous store at 127\.0\.0\.1:\d+ has"
    )
    assert re.match(f"error: {said}", stderr)
    assert f"rank-{1 - stopped}.stacks" in os.listdir(workplace / "out" / "logs")

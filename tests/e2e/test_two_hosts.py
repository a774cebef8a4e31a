"""Two hosts train one run, however its ranks are started; one that dies or is cut off ends the other, which says so."""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.two_hosts import NAMES, STEPS, Host, needs_hosts, two_hosts, wait_until
from tests.train.runs import checkpoints, losses, metrics

pytestmark = [pytest.mark.slow, needs_hosts]

ENDLESS = ("train.steps=100000", "checkpoint.every=100000")
HELD = 5
"""Step in which rank 1 waits for a signal, in `tests.e2e.held`."""
SLACK = 14
"""Seconds beyond the timeout, on a busy machine."""
PORT = 29500
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1")
Start = tuple[tuple[str, ...], dict[str, str]]
"""What stands between `python` and a module's name, and environment variables."""


def torchrun_static(node: int) -> Start:
    return (*TORCHRUN, f"--node-rank={node}", f"--master-addr={NAMES[0]}", f"--master-port={PORT}"), {}


def torchrun_c10d(node: int) -> Start:
    return (*TORCHRUN, "--rdzv-backend=c10d", f"--rdzv-endpoint={NAMES[0]}:{PORT}", "--rdzv-id=rehearsal"), {}


def variables(node: int) -> Start:
    """As a scheduler or a script sets them."""
    rank = {"RANK": str(node), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return (), rank | {"MASTER_ADDR": NAMES[0], "MASTER_PORT": str(PORT)}


def nodes(node: int) -> Start:
    """Each host's own launcher starts its ranks, as in a container of Kubeflow's."""
    job = {"PET_NNODES": "2", "PET_NODE_RANK": str(node), "PET_NPROC_PER_NODE": "1"}
    return (), job | {"PET_MASTER_ADDR": NAMES[0], "PET_MASTER_PORT": str(PORT)}


Launcher = Callable[[int], Start]


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as hosts:
        yield hosts


def start(
    hosts: tuple[Host, Host], launcher: Launcher, workplace: Path, *overrides: str, program: str = "longctx"
) -> "list[subprocess.Popen[str]]":
    """Train on both hosts."""
    jobs = []
    for node, host in enumerate(hosts):
        before, own = launcher(node)
        command = [sys.executable, *before, "-m", program, "train", "tiny.toml", *overrides, "--out", "out"]
        jobs.append(host.popen(*command, cwd=workplace, env=own | {"SIGNALLED_STEP": str(HELD)}))
    return jobs


def ended(job: "subprocess.Popen[str]", timeout: float = 100) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a job."""
    stdout, stderr = job.communicate(timeout=timeout)
    return job.returncode, stdout, stderr


def wait_for_step(jobs: "list[subprocess.Popen[str]]", workplace: Path, step: int) -> None:
    """Wait until the run has made a step."""
    path = workplace / "out" / "metrics.jsonl"

    def has_come() -> bool:
        assert all(job.poll() is None for job in jobs), [ended(job) for job in jobs if job.poll() is not None]
        return path.exists() and f'"step": {step},' in path.read_text()

    wait_until(has_come, 100, lambda: f"step {step} has not come")


@pytest.mark.parametrize("launcher", [torchrun_static, torchrun_c10d, nodes])
def test_hosts_compute_what_one_does(
    hosts: tuple[Host, Host], workplace: Path, whole: Path, launcher: Launcher
) -> None:
    for status, _, stderr in map(ended, start(hosts, launcher, workplace, *STEPS)):
        assert status == 0, stderr
    assert [run.step for run in metrics(workplace / "out").runs] == [0]
    assert losses(workplace / "out") == losses(whole)


@pytest.mark.parametrize("launcher", [torchrun_c10d, variables])
def test_if_a_host_dies_the_other_ends_and_both_continue_when_they_are_started_again(
    hosts: tuple[Host, Host], workplace: Path, whole: Path, launcher: Launcher
) -> None:
    first, second = start(hosts, launcher, workplace, *STEPS, "parallel.timeout=60s", program="tests.e2e.held")
    wait_for_step([first, second], workplace, HELD - 1)
    wait_until(lambda: "step-00000003" in checkpoints(workplace / "out"), 30, lambda: "no checkpoint")
    hosts[1].kill()
    killed = time.monotonic()
    status, _, stderr = ended(first)
    assert status == 1
    assert time.monotonic() - killed < 60
    peer = rf"rank 1 on {hosts[1].name} \({hosts[1].address}\)"
    lost = rf"error: .+: rank 0 lost contact with {peer}, which died or timed out\. --resume auto"
    assert re.search(lost, stderr), stderr

    hosts[1].start()
    for status, _, stderr in map(ended, start(hosts, launcher, workplace, *STEPS)):
        assert status == 0, stderr
    assert [run.step for run in metrics(workplace / "out").runs] == [0, 3]
    assert losses(workplace / "out") == losses(whole)


def test_if_the_link_is_down_in_a_step_both_hosts_end(hosts: tuple[Host, Host], workplace: Path) -> None:
    jobs = start(hosts, nodes, workplace, *ENDLESS, "parallel.timeout=16s")
    wait_for_step(jobs, workplace, 3)
    hosts[1].set_link("down")
    cut = time.monotonic()
    (status, _, stderr), (other_status, _, other_stderr) = map(ended, jobs)
    assert (status, other_status) == (1, 1)
    assert time.monotonic() - cut < 16 + SLACK
    silent = (
        r"error: rank 1 \(process \d+ on node1\) has not reported for \d+ s: its process is stopped, or its machine"
    )
    assert re.search(silent, stderr), stderr
    alone = rf"step \d+: (the rendezvous store at node0:{PORT} has not answered|rank 1 lost contact with)"
    last = rf"error: rank 1 on node1 exited with status 1; it says: {alone}.*\. Its output: out/logs/rank-1\.log\."
    assert re.search(last, other_stderr), other_stderr


def fail_on(started: list[Host], folder: Path) -> None:
    """A test that fails while something runs on its hosts."""
    with two_hosts() as hosts:
        for host in hosts:
            started.append(host)
            host.popen("sleep", "1000", cwd=folder)
            wait_until(lambda host=host: len(host.processes()) == 3, 30, lambda: "a shell, its sleep, and this one")
        raise ZeroDivisionError


def test_a_test_that_fails_leaves_no_process_and_no_namespace(tmp_path: Path) -> None:
    started: list[Host] = []
    with pytest.raises(ZeroDivisionError):
        fail_on(started, tmp_path)
    for host in started:
        wait_until(lambda host=host: not host.processes(), 30, lambda: "processes of a host")
    assert not any(host.network in subprocess.check_output(["ip", "netns"], text=True) for host in started)

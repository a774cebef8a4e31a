"""Hosts reached by ssh: the script of a host, and the supervisor of all of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.errors import UserError
from longctx.launch.cluster.job import plan_job
from longctx.launch.cluster.profile import SshProfile
from longctx.launch.cluster.ssh import Ssh, supervise


def prepared(workplace: Path, **keys):
    profile = SshProfile(executor="ssh", **{"hosts": ("me@a", "b"), **keys})
    return Ssh(profile).prepare(plan_job("quickstart", [], [], profile, None))


def test_each_host_runs_the_script_with_its_number(workplace):
    submission = prepared(workplace, options=("-p", "2222"))
    script = workplace / "runs/quickstart/job/node.sh"
    assert submission.command == ("ssh", "-o", "BatchMode=yes", "-p", "2222", "me@a", f"bash {script} 0")
    text = submission.files[script]
    assert "export PET_MASTER_ADDR=a PET_MASTER_PORT=29500\n" in text, "the first host without its user"
    assert (
        "PET_MASTER_ADDR=10.0.0.1 PET_MASTER_PORT=7\n" in prepared(workplace, address="10.0.0.1", port=7).files[script]
    )


def test_a_sweep_needs_arrays(workplace):
    profile = SshProfile(executor="ssh", hosts=("a", "b"))
    job = plan_job("quickstart", [], ["optimizer.lr=1e-3,3e-4"], profile, None)
    with pytest.raises(UserError, match="needs an executor with arrays of jobs, slurm, not ssh"):
        Ssh(profile).prepare(job)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing(workplace):
    submission = prepared(workplace, environment={"A": "1 2"})
    text = submission.files[submission.script]
    found = subprocess.run(["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def start_script(workplace: Path, program: str) -> "subprocess.Popen[str]":
    """Start a host's script as ssh would, with a program in place of longctx."""
    (workplace / "program").write_text(f"#!/bin/bash\n{program}\n")
    (workplace / "program").chmod(0o755)
    submission = prepared(workplace, program=str(workplace / "program"))
    (workplace / "script").write_text(submission.files[submission.script])
    return subprocess.Popen(["bash", "script", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_script_ends_with_its_ranks_status(workplace):
    process = start_script(workplace, 'echo "$PET_NODE_RANK of $PET_NNODES: $*"; exit 7')
    assert process.stdout.read() == "1 of 2: train runs/quickstart/job/recipe.toml --out runs/quickstart --nproc 1\n"
    assert process.wait(10) == 7


def test_its_ranks_stop_when_the_connection_ends(workplace):
    process = start_script(workplace, "trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout.readline() == "ready\n"
    process.stdin.close()
    assert process.stdout.read() == "saved\n"
    assert process.wait(10) == 143


def hosts(*bodies: str) -> list[tuple[str, ...]]:
    return [("bash", "-c", body) for body in bodies]


def test_a_job_whose_hosts_are_done_is_done(tmp_path):
    assert supervise(hosts("true", "echo said"), ["a", "b"], tmp_path, 1.0) == 0
    assert (tmp_path / "node-1.log").read_text() == "said\n"


def test_the_host_that_failed_first_is_named_with_its_last_lines(tmp_path, capsys):
    failing = "echo the cause; exit 2"
    assert supervise(hosts("sleep 0.5; exit 1", failing), ["a", "b"], tmp_path, 1.0) == 2
    said = capsys.readouterr().err
    assert "b: the cause\n" in said
    assert f"error: b (node 1) ended with status 2. Its output: {tmp_path}/node-1.log." in said


def test_hosts_that_do_not_end_after_a_failure_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr("longctx.launch.cluster.ssh._SETTLE", 0.2)
    began = time.monotonic()
    assert supervise(hosts("sleep 60", "exit 1"), ["a", "b"], tmp_path, 0.1) == 1
    assert time.monotonic() - began < 20


def test_a_signal_stops_all_hosts_which_save(tmp_path):
    saving = "trap : INT TERM; cat > /dev/null; echo saved; exit 143"
    code = (
        "import sys; from pathlib import Path; from longctx.launch.cluster.ssh import supervise\n"
        f"sys.exit(supervise([('bash', '-c', {f'echo ready; {saving}'!r}), ('bash', '-c', {saving!r})], ['a', 'b'], "
        f"Path({str(tmp_path)!r}), 5.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (143, "saved\n", "SIGTERM: saving and stopping on 2 hosts\n")
    assert (tmp_path / "node-1.log").read_text() == "saved\n"

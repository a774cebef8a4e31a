"""`longctx doctor`: it starts ranks that examine this machine, or is one of a job's; its table and exit status."""

import io
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longctx.doctor.findings import Finding
from longctx.hardware_profile import load_profile
from longctx.launch import doctor as command
from longctx.launch.job_environment import Meeting, NodeOfJob
from tests.launch.test_main import run
from tests.test_hardware_profile import PROFILE

ROOT = Path(__file__).resolve().parents[2]
WARNING = Finding("host name", "vm is 127.0.1.1", "warning", "correct it", "vm")
WRONG = Finding("/dev/shm", "64 MiB", "wrong", "--shm-size=8g")
JOB = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in JOB:
        monkeypatch.delenv(name, raising=False)


def printed(*found: Finding) -> str:
    stream = io.StringIO()
    command.print_findings(found, Console(file=stream, width=command.WIDTH))
    return stream.getvalue()


def test_a_table_has_everything_and_below_it_what_to_do() -> None:
    text = printed(Finding("torch", "2.13"), WARNING, WRONG)
    lines = [line.rstrip() for line in text.splitlines()]
    assert [line.split()[0] for line in lines[:4]] == ["check", "torch", "host", "/dev/shm"]
    assert "vm is 127.0.1.1 [vm]" in lines[2]
    assert "warning: host name on vm: vm is 127.0.1.1\n  correct it\n" in text
    assert "wrong: /dev/shm: 64 MiB\n  --shm-size=8g\n" in text
    assert lines[-1] == "1 fault, 1 warning."
    also = Finding("copy", "1 GB/s", "warning", "correct it")
    together = "warning: host name on vm: vm is 127.0.1.1\nwarning: copy: 1 GB/s\n  correct it\n"
    assert together in printed(WARNING, also), "what to do about both is said once"
    assert printed(Finding("torch", "2.13")).endswith("\nNo fault, 0 warnings.\n")


def test_a_value_is_shown_as_it_is() -> None:
    assert "[red]x" in printed(Finding("environment", "A=[red]x\x1b[2J"))
    assert "\x1b" not in printed(Finding("environment", "A=\x1b[2J"))


def test_ranks_of_this_machine_write_the_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ENTRY", "tests.launch.doctor_ranks:run_rank")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    file = tmp_path / "profile.json"
    status = command.doctor(nproc=2, out=Path("runs"), timeout=60, json_file=file)
    stdout, stderr = capfd.readouterr()
    found = load_profile(file)
    assert (found.device, found.ranks, found.ranks_per_node, len(found.nodes)) == ("cpu", 2, 2, 1)
    assert {(one.collective, one.scope, one.backend, one.ranks) for one in found.links} == {
        (name, "node", "gloo", 2) for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv")
    }
    assert all([sample.bytes for sample in one.samples] == [4096, 8192] for one in found.links)
    assert found.disk is not None
    assert found.disk.path == str(tmp_path / "runs")
    assert [one.rank for one in found.rank_rates] == [0, 1]
    assert found.matmul["float32"] == min(one.matmul["float32"] for one in found.rank_rates)
    assert "send_recv, inside a node" in stdout
    assert status == (0 if stdout.splitlines()[-1].startswith("No fault,") else 1)
    assert f"hardware profile: {file}" in stderr
    assert os.listdir(tmp_path) == ["profile.json"], "nothing else is left"


@pytest.mark.parametrize("status", [0, 1])
def test_the_launcher_returns_what_its_rank_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int) -> None:
    started = []

    def run_ranks(entry: str, arguments: dict[str, str], **options: object) -> int:
        started.append((arguments, options))
        Path(arguments["logs"], "status").write_text(str(status))
        return 0

    monkeypatch.setattr(command, "run_ranks", run_ranks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert run("doctor", "--out", "there", "--timeout", "9")[0] == status
    ((arguments, options),) = started
    assert (arguments["out"], arguments["timeout"], arguments["json_file"]) == (str(tmp_path / "there"), 9, None)
    assert (options["ranks"], options["node"], options["on_stop"]) == (8, None, "stopping")
    assert not Path(arguments["logs"]).exists()


def test_a_failed_rank_leaves_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    logs = []
    monkeypatch.setattr(command, "run_ranks", lambda entry, arguments, **options: logs.append(options["logs"]) or 1)
    assert run("doctor")[0] == 1
    assert logs[0].is_dir()
    logs[0].rmdir()


def test_a_node_of_a_job_starts_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    node = NodeOfJob("PET_NNODES", 1, 2, Meeting("a", 1), ranks=4)
    options = []
    monkeypatch.setattr(command, "find_job", lambda nproc: node)
    monkeypatch.setattr(command, "run_ranks", lambda entry, arguments, **found: options.append(found) or 143)
    assert command.doctor(nproc=None, out=Path("runs"), timeout=9, json_file=None) == 143
    assert (options[0]["ranks"], options[0]["node"]) == (4, node)
    assert not options[0]["logs"].exists()


def examination(monkeypatch: pytest.MonkeyPatch, examine: Callable[..., object]) -> None:
    module = types.ModuleType("longctx.doctor.examine")
    module.examine = examine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "longctx.doctor.examine", module)


def test_sigterm_ends_a_rank_which_removes_what_it_wrote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    removed = []

    def examine(directory: Path, **options: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            removed.append(directory)

    before = signal.getsignal(signal.SIGTERM)
    examination(monkeypatch, examine)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command.run_rank(out="runs", timeout=9, json_file=None, logs=str(tmp_path)) == 128 + signal.SIGTERM
    assert (removed, signal.getsignal(signal.SIGTERM)) == ([Path("runs")], before)
    assert not (tmp_path / "status").exists()


@pytest.mark.parametrize(("found", "status"), [(WARNING, 0), (WRONG, 1)])
def test_inside_a_job_this_process_is_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: Finding, status: int
) -> None:
    called = []

    def examine(directory: Path, **options: object) -> types.SimpleNamespace:
        called.append((directory, options["timeout"], options["stacks"]))
        report = types.SimpleNamespace(findings=[found], profile=PROFILE)
        options["finish"](report)  # type: ignore[operator]
        return report

    examination(monkeypatch, examine)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert run("doctor", "--json", "p.json")[0] == status
    assert called == [(Path("runs"), 120.0, Path("runs/logs"))]
    assert load_profile(Path("p.json")) == PROFILE


def test_a_rank_of_a_job_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    status, stderr = run("doctor", "--nproc", "2")
    assert (status, "already one rank of 2" in stderr) == (2, True)


def test_a_profile_that_cannot_be_written_is_refused_before_anything_is_measured() -> None:
    assert run("doctor", "--json", "no/p.json") == (
        2,
        "error: --json no/p.json: there is no directory no; create it first\n",
    )

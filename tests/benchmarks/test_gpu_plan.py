"""The plan of the GPU benchmark, and its rehearsal: every step runs on a CPU, on the path that it takes on a GPU."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import pytest

from benchmarks import gpu_plan
from benchmarks.gpu_plan import GPU, KINDS, LIMIT, REHEARSAL, TIMED
from benchmarks.gpu_runner import Phase, Step

ROOT = Path(__file__).resolve().parents[2]
FEW = (
    "system", "process-group", "compile/additive/vector/float16/*", "compile/attention/float32/*",
    "check/delta/scalar/float32/40-1-16", "check/attention/float16/*", "check/scan/*",
    "check/additive/scalar/head-major/*", "time/additive/scalar/float16/40-1-16", "time/attention/*",
    "check/swiglu/*", "time/swiglu/*", "train/longest", "peer/additive/constant/*",
)  # fmt: skip
"""A step of each function that does not start a program of its own."""
FEWEST = ("process-group", "time/additive/scalar/float16/40-1-16")
"""Two phases: enough to see that a rehearsal starts, runs and ends; all others in `make test-all`."""


def parts(at: gpu_plan.Sizes) -> dict[str, list[Phase]]:
    return {
        "first": gpu_plan.first_part(at, "work"),
        "tune": gpu_plan.tune_part(at, "out"),
        "nccl": gpu_plan.nccl_part(at, "work", 2),
        "verify": gpu_plan.verify_part(at),
    }


def steps(phases: list[Phase]) -> list[Step]:
    return list(chain.from_iterable(phase.steps for phase in phases))


@pytest.mark.parametrize("part", ["first", "tune", "nccl", "verify"])
@pytest.mark.parametrize("at", [GPU, REHEARSAL], ids=["GPU", "rehearsal"])
def test_every_step_calls_a_function_with_arguments_that_it_takes(at: gpu_plan.Sizes, part: str) -> None:
    phases = parts(at)[part]
    names = [step.name for step in steps(phases)]
    assert len(set(names)) == len(names)
    for step in steps(phases):
        module, _, function = step.call.partition(":")
        inspect.signature(getattr(importlib.import_module(module), function)).bind(*step.args)


@pytest.mark.parametrize("part", ["first", "tune", "nccl", "verify"])
def test_a_part_ends_within_its_time(part: str) -> None:
    phases = parts(GPU)[part]
    assert all(earlier.until < later.until for earlier, later in pairwise(phases))
    assert phases[-1].until == LIMIT <= 570
    for phase, begin in zip(phases, [0, *(phase.until for phase in phases)], strict=False):
        assert all(0 < step.seconds <= LIMIT - begin for step in phase.steps), phase.name


def test_a_rehearsal_has_the_steps_of_a_gpu() -> None:
    for name, phases in parts(GPU).items():
        rehearsed = parts(REHEARSAL)[name]
        if name != "verify":
            assert [step.call for step in steps(phases)] == [step.call for step in steps(rehearsed)]
        else:
            assert {step.call for step in steps(phases)} == {step.call for step in steps(rehearsed)}


def test_what_is_timed_is_checked_at_that_size() -> None:
    first = parts(GPU)["first"]
    names = [step.name for step in steps(first)]
    checked = {name.removeprefix("check/") for name in names if name.startswith("check/")}
    timed = {name.removeprefix("time/") for name in names if name.startswith("time/")}
    compared = {name.removeprefix("peer/") for name in names if name.startswith("peer/")}
    assert timed <= checked
    assert compared <= timed
    for kind in KINDS:
        for dtype in ("bfloat16", "float32"):
            assert {f"{kind}/{dtype}/64K-16-128", f"{kind}/{dtype}/16K-16-64/documents"} <= checked
            assert any(name.startswith(f"compile/{kind}/{dtype}") for name in names)
    assert {"scan/scalar", "scan/vector"} <= checked
    assert set(TIMED) < set(KINDS)
    assert "pytest/attention" in names


def test_the_order_is_compile_check_time_train_peers() -> None:
    names = [phase.name for phase in parts(GPU)["first"]]
    assert names == ["system", "compile", "check", "check, long", "time", "train", "peers"]
    assert [phase.until for phase in parts(GPU)["first"]] == [45, 140, 200, 275, 345, 520, 570]


def test_the_head_major_check_reaches_beyond_32_bits() -> None:
    tokens, heads, dim = GPU.head_major
    assert 4 * tokens * dim * (heads - 1) >= 2**31


def test_the_wheels_are_the_versions_that_are_tested() -> None:
    def versions(file: str) -> set[str]:
        lines = (ROOT / file).read_text().splitlines()
        return {line.split(" ")[0] for line in lines if line and not line.startswith("#")}

    assert versions("benchmarks/gpu-wheels.txt") <= versions("constraints.txt")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_without_a_gpu_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_plan.main(["--out", str(tmp_path / "out")])
    assert "no GPU here: --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rehearse(out: Path, *options: str, seconds: float) -> dict[str, dict]:
    command = ["bash", "benchmarks/gpu.sh", "--rehearse", "--out", str(out), *options]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    logs = "".join(file.read_text() for file in out.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs[-5000:]
    (file,) = out.glob("*.jsonl")
    head, *rows, end = [json.loads(line) for line in file.read_text().splitlines()]
    assert head["rehearsal"]
    assert head["versions"]["torch"]
    assert end["failed"] == 0
    for row in rows:
        assert row["step"] in done.stdout
    return {row["step"]: row for row in rows}


@pytest.mark.parametrize("names", [FEWEST, pytest.param(FEW, marks=pytest.mark.slow)], ids=["fewest", "few"])
def test_a_rehearsal_runs_to_its_end(tmp_path: Path, names: tuple[str, ...]) -> None:
    rows = rehearse(tmp_path, *(part for name in names for part in ("--only", name)), seconds=280)
    assert len(rows) >= len(names)
    assert all(row["status"] == "ok" for row in rows.values())
    timed = rows["time/additive/scalar/float16/40-1-16"]
    assert timed["forward"]["ms"] > 0
    assert timed["kernels"]
    if names == FEW:
        errors = rows["check/delta/scalar/float32/40-1-16"]["errors"]
        assert errors.keys() == {"o", "dq", "dk", "dv", "dbeta", "dlog_decay"}
        assert rows["system"]["copy_bytes_per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["first", "tune", "nccl", "verify"])
def test_every_step_of_every_part_runs_in_a_rehearsal(tmp_path: Path, part: str) -> None:
    rows = rehearse(tmp_path, *([] if part == "first" else [f"--{part}"]), seconds=1200)
    assert list(rows) or part
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    assert rows.keys() == {step.name for step in steps(parts(REHEARSAL)[part])}
    if part == "first":
        assert rows["generate"]["generated"] > 0
        assert rows["train/256"]["utilisation"] > 0

"""The runner of the GPU benchmark: whatever a step does, it costs one line, and the next one runs."""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu_runner import Phase, Results, Step, run

FAULTS = "tests.benchmarks.faults"


def lines(out: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (out / "first.jsonl").read_text().splitlines()]
    assert len({row["step"] for row in rows}) == len(rows), "more than one line for a step"
    return {row["step"]: row for row in rows}


def step(name: str, *args: object, seconds: float = 60.0) -> Step:
    return Step(name, f"{FAULTS}:{name}", args, seconds)


def go(out: Path, *steps: Step, workers: int = 1, until: float = 300.0) -> dict[str, dict]:
    run([Phase("faults", until, steps, workers)], Results(out))
    return lines(out)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    out = tmp_path_factory.mktemp("out")
    names = ("fail", "segmentation_fault", "abort", "killed", "leave", "device_assert", "wrong", "skipped")
    steps = [step(name) for name in names] + [step("does_not_compile"), step("hang", str(out / "child"), seconds=6)]
    after = [Step(f"after {s.name}", f"{FAULTS}:numbers", (7.0,), 60) for s in steps]
    mixed = [s for pair in zip(steps, after, strict=True) for s in pair]
    return out, go(out, *mixed, workers=2)


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("fail", "failed", "ValueError: the cause"),
        ("does_not_compile", "failed", "CompileTimeAssertionFailure"),
        ("hang", "timeout", "it took more than"),
        ("segmentation_fault", "crashed", "SIGSEGV"),
        ("abort", "crashed", "SIGABRT"),
        ("killed", "crashed", "killed"),
        ("leave", "crashed", "status 3"),
        ("device_assert", "crashed", "device-side assert"),
        ("wrong", "failed", "dq 1.0"),
    ],
)
def test_a_step_that_goes_wrong_costs_one_line_and_the_next_one_runs(faults, name, status, text) -> None:
    _, rows = faults
    assert rows[name]["status"] == status
    assert text in rows[name]["error"] + rows[name].get("trace", "")
    assert rows[f"after {name}"]["status"] == "ok"
    assert rows[f"after {name}"]["value"] == 7.0


def test_what_was_measured_before_a_fault_is_kept(faults) -> None:
    _, rows = faults
    assert rows["fail"]["measured"] == rows["hang"]["measured"] == 5
    assert (rows["after fail"]["first"], rows["after fail"]["second"]) == (1, 2)


def test_a_hanging_step_takes_its_time_and_ends_with_its_children(faults) -> None:
    out, rows = faults
    assert 5 < rows["hang"]["seconds"] < 20
    child = int((out / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, 0)
    pytest.fail("the child is still there")


def test_a_step_that_cannot_run_here_says_why(faults) -> None:
    _, rows = faults
    assert rows["skipped"]["status"] == "skipped"
    assert rows["skipped"]["reason"] == "fla is not installed"


def test_output_is_kept_and_shows_where_a_step_hung(faults) -> None:
    out, _ = faults
    log = (out / "first.log").read_text()
    assert "some output" in log
    assert "in hang" in log
    assert "Fatal Python error: Segmentation fault" in log


def test_steps_share_a_process_until_one_goes_wrong(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    first, second, third = (Step(name, f"{FAULTS}:process", (), 60) for name in names)
    rows = go(tmp_path, first, second, step("leave"), third)
    assert rows["a"]["pid"] == rows["b"]["pid"] != rows["c"]["pid"]


def test_a_result_is_on_the_disk_before_the_next_step_ends(tmp_path: Path) -> None:
    seen = []

    class Watched(Results):
        def write(self, row, log=""):
            seen.append(len((tmp_path / "first.jsonl").read_text().splitlines()) if seen else 0)
            super().write(row, log)

    steps = [Step(str(number), f"{FAULTS}:numbers", (number,), 60) for number in range(3)]
    run([Phase("three", 300, tuple(steps))], Watched(tmp_path))
    assert seen == [0, 1, 2]


def test_no_step_starts_after_its_phase_and_the_next_phase_runs(tmp_path: Path) -> None:
    results = Results(tmp_path)
    late = Phase("late", 0.5, (step("process"),))
    failed = run([late, Phase("next", 300, (step("leave"), step("skipped")))], results)
    rows = lines(tmp_path)
    assert rows["process"] | {"seconds": 0} == {
        "step": "process", "status": "skipped", "seconds": 0, "reason": "no time left",
    }  # fmt: skip
    assert rows["leave"]["status"] == "crashed"
    assert failed == 1


@pytest.mark.slow
def test_a_part_in_which_everything_hangs_ends_in_time_with_a_line_for_each_step(tmp_path: Path) -> None:
    def phase(name: str, until: float) -> Phase:
        names = (f"{name} 1", f"{name} 2")
        return Phase(name, until, tuple(Step(n, f"{FAULTS}:hang", (str(tmp_path / n),), 600) for n in names))

    results = Results(tmp_path)
    assert run([phase("first", 4), phase("second", 8)], results) == 2
    assert results.elapsed < 15
    statuses = {name: row["status"] for name, row in lines(tmp_path).items()}
    assert statuses == {"first 1": "timeout", "first 2": "skipped", "second 1": "timeout", "second 2": "skipped"}


def test_a_function_that_does_not_exist_costs_one_line(tmp_path: Path) -> None:
    rows = go(tmp_path, Step("missing", "benchmarks.nothing:here", (), 60), step("process"))
    assert "No module named 'benchmarks.nothing'" in rows["missing"]["error"]
    assert rows["process"]["status"] == "ok"

"""The page of the kernels that are compiled without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_offline
from tests.benchmarks.test_gpu_plan import ROOT


@pytest.mark.slow
def test_a_case_becomes_a_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = [sys.executable, "-m", "benchmarks.gpu_offline", "--page", str(page), "--workers", "1"]
    command += ["--only", "additive/constant/bfloat16/64/sm_90"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert "## longctx, sm_90, bfloat16, head dim 64" in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| additive/constant")]
    assert {row[1] for row in rows} == {"summarize", "apply", "summarize_grad", "apply_grad"}
    assert len({len(row) for row in rows} | {1 + len(gpu_offline.COLUMNS)}) == 1
    registers = [int(row[1 + gpu_offline.COLUMNS.index("registers")]) for row in rows]
    assert all(32 < count <= 255 for count in registers)


def test_what_does_not_compile_and_what_did_not_end_well_are_rows() -> None:
    def refuse() -> None:
        raise RuntimeError("PassManager::run failed\nand more")

    error = gpu_offline._tried(refuse)
    assert error == "does not compile: RuntimeError: PassManager::run failed"
    rows = [
        {"step": "additive/scalar/float32/128/sm_100", "status": "ok", "rows": [["apply_grad", error]]},
        {"step": "fla/additive/vector/bfloat16/64/sm_80", "status": "timeout", "error": "too long"},
    ]
    page = gpu_offline.render(rows, "triton 1")
    assert f"| additive/scalar | apply_grad | {error} |" in page
    assert "## fla, sm_80, bfloat16, head dim 64" in page
    assert "| additive/vector |  | timeout: too long |" in page


def test_every_recurrence_dtype_head_dim_and_architecture_is_on_the_page() -> None:
    ours = [step.name for phase in gpu_offline.phases(None, 1) for step in phase.steps]
    assert len(ours) == len(set(ours)) == (6 * 2 + 5) * 2 * 3
    theirs = [step.name for phase in gpu_offline.phases("DIR", 1) for step in phase.steps][0:]
    assert sum(name.startswith("fla/") for name in theirs) == 5 * 2 * 3

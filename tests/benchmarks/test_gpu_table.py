"""The tables of the GPU benchmark say what was measured, and that nothing was where nothing was."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu_table

HEADER = {
    "header": "first", "date": "2026-12-01T10:00:00+00:00", "chip": "NVIDIA H100 80GB HBM3", "gpus": 1,
    "driver": "580.1", "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "commit": "abc",
    "sources": "def", "rehearsal": False,
}  # fmt: skip


def timing(ms: float) -> dict:
    return {"ms": ms, "least_ms": ms, "most_ms": ms, "host_ms": 0.1}


ROWS = [
    HEADER,
    {"step": "system", "status": "ok", "copy_bytes_per_second": 3e12, "bf16_flops_per_second": 7e14},
    {"step": "check/additive/scalar/bfloat16/64K-16-128", "status": "ok"},
    {"step": "check/delta/scalar/bfloat16/64K-16-128", "status": "failed", "error": "dq 1.0"},
    {"step": "time/additive/scalar/bfloat16/64K-16-128", "status": "ok", "forward": timing(2.0), "both": timing(6.0),
     "forward_bytes": 3e9, "both_bytes": 9e9, "peak_mib": 2048.0},
    {"step": "time/delta/scalar/bfloat16/64K-16-128", "status": "timeout",
     "forward": timing(5.0) | {"device_ms": 4.0}, "error": "too long", "forward_bytes": 3e9, "both_bytes": 9e9},
    {"step": "time/attention/bfloat16/64K-16-128", "status": "ok",
     "backends": {"triton": {"forward": timing(30.0), "both": timing(99.0)}}},
    {"step": "train/65536", "status": "ok", "step_seconds": 2.0, "tokens_per_second": 32768.0, "utilisation": 0.3,
     "memory_gib": 40.0},
    {"step": "generate", "status": "ok", "prompt": 16384, "first_token_seconds": 0.5, "tokens_per_second": 40.0},
    {"step": "peer/additive/scalar/bfloat16/64K-16-128", "status": "ok", "forward": timing(3.0), "both": timing(8.0)},
    {"end": "first", "seconds": 500, "failed": 2},
]  # fmt: skip


def written(folder: Path, rows: list[dict]) -> Path:
    file = folder / "first.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_page_is_the_one_that_the_results_give() -> None:
    page = (gpu_table.FOLDER / "README.md").read_text()
    assert page == gpu_table.render(gpu_table.FOLDER.glob("*.jsonl"))


def test_without_results_the_page_says_so() -> None:
    assert "Not measured on a GPU." in gpu_table.render([])


def test_a_run_becomes_a_file_and_a_table(tmp_path: Path) -> None:
    file = gpu_table.add(written(tmp_path, ROWS), tmp_path / "gpu")
    assert file.name == "2026-12-01-nvidia-h100-80gb-hbm3.jsonl"
    page = gpu_table.render([file])
    assert "Not measured" not in page
    assert "| additive/scalar/bfloat16/64K-16-128 | 2 | 50% | 2 | 0.1 | 3 | 6 | 50% | 6 | 0.1 | 8 | 2 |" in page
    assert "| delta/scalar/bfloat16/64K-16-128 | 4 | 25% | 5 | 0.1 |  |  |  |  |  |  | 0 |" in page
    assert "attention/bfloat16/64K-16-128, triton | 30 |" in page
    assert "| train/65536 |  | 2 | 32,768 | 30% | 40 |" in page
    assert "1 of 2 checks" in page
    assert "- `time/delta/scalar/bfloat16/64K-16-128`: timeout: too long" in page
    assert "3 TB/s copied" in page


def test_a_run_that_was_cut_off_is_still_read(tmp_path: Path) -> None:
    file = written(tmp_path, ROWS[:3])
    with file.open("a") as end:
        end.write('{"step": "time/addi')
    assert len(gpu_table.read(file)) == 3
    assert "1 of 1 checks" in gpu_table.render([file])


def test_further_runs_of_a_day_are_numbered_and_a_run_is_kept_once(tmp_path: Path) -> None:
    later = [HEADER | {"date": "2026-12-01T11:00:00+00:00"}, *ROWS[1:]]
    names = [gpu_table.add(written(tmp_path, rows), tmp_path / "gpu").name for rows in (ROWS, later, ROWS, later)]
    assert names == ["2026-12-01-nvidia-h100-80gb-hbm3.jsonl", "2026-12-01-nvidia-h100-80gb-hbm3-2.jsonl"] * 2


@pytest.mark.parametrize("change", [{"rehearsal": True}, {"chip": None}])
def test_a_rehearsal_is_not_kept(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match="nothing to keep"):
        gpu_table.add(written(tmp_path, [HEADER | change]), tmp_path / "gpu")

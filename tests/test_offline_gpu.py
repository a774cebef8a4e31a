"""The recording driver: real launches compile, and their resources are those of the machine code."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from longctx.kernels.linear import tuning
from tests import offline_gpu


def compiled(*arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.offline_gpu", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow  # tests/kernels/test_triton_compile.py reads the same rows in every run
def test_every_pass_is_recorded_with_its_resources():
    found = compiled("--dim", "64", "additive/constant")
    assert {row["pass_"] for row in found} == {"summarize", "apply", "summarize_grad", "apply_grad"}
    for row in found:
        used = row["resources"]
        assert 32 < used["registers"] <= 255
        assert 0 < used["loop_instructions"] < used["instructions"]
        assert row["blocks_per_sm"] > 0
        assert used["wgmma"] > 0, row["kernel"]


def test_a_kernel_that_does_not_compile_is_a_row_with_its_error(monkeypatch, capsys):
    monkeypatch.setattr(offline_gpu, "record", lambda capability: [])  # nothing is launched
    monkeypatch.setattr(tuning, "_compute_capability", tuning._compute_capability)
    monkeypatch.setattr(sys, "argv", ["offline_gpu", "--dim", "1024", "additive/constant"])
    offline_gpu.main()
    row = json.loads(capsys.readouterr().out)
    assert "head dims up to 512" in row["error"]

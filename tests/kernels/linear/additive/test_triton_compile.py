"""Constant and scalar decays compiled for GPUs that are not there: the kernels compile, fit, and do not spill."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

STACK = {"bfloat16": 64, "float32": 256}
"""Bytes of local memory that a thread may use."""


def compiled(*arguments):
    command = [sys.executable, "-m", "tests.offline_gpu", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("decay", ["scalar", slow("constant")])
@pytest.mark.parametrize(
    ("dtype", "key_dim", "value_dim"),
    [
        slow("bfloat16", 64, 64),
        ("bfloat16", 128, 128),
        slow("bfloat16", 256, 256),
        slow("float32", 64, 64),
        slow("float32", 128, 128),
        slow("float32", 128, 129),
        slow("float32", 256, 256),
    ],
)
@pytest.mark.parametrize("capability", [slow(80), 90, slow(100)])
@pytest.mark.parametrize("document", [0, slow(1000)])
def test_the_defaults_fit_and_do_not_spill(decay, dtype, key_dim, value_dim, capability, document):
    sizes = "--dim", str(key_dim), "--value-dim", str(value_dim), "--document", str(document)
    rows = compiled("--capability", str(capability), "--dtype", dtype, *sizes, f"additive/{decay}")
    assert {row.get("pass_") for row in rows} == {"summarize", "apply", "summarize_grad", "apply_grad"}, rows[-1]
    for row in rows:
        used, name = row["resources"], f"{row['pass_']} {row['kernel']} {row['chunk']}"
        assert used["registers"] > 32 or used["stack"] == 0, name
        assert used["stack"] <= STACK[dtype], name
        # Also on the GPUs of compute capability 8.6, 8.9 and 12.0.
        assert used["shared"] <= 99 * 1024, name
        assert row["blocks_per_sm"] * used["warps"] >= 8, name
        if dtype == "bfloat16":
            assert used["wgmma" if capability >= 90 else "mma"] > 0, name
            assert used["async_copies"] > 0 or used["stages"] == 1, name
            assert used["stages"] == 2 or (row["kernel"] == "summary_kernel" and capability < 90), name

"""What the delta rule's kernels for scalar decays compile to on sm_90: registers, pipelines, tensor cores."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_scans_are_pipelined_and_nothing_spills():
    command = [sys.executable, "-m", "tests.offline_gpu", "--dim", "128", "delta/scalar"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"prepare_kernel", "forward_kernel", "backward_kernel", "pair_grads_kernel", "grads_kernel"}
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        name, used = (row["pass_"], row["kernel"]), row["resources"]
        assert used["stack"] <= 64, name
        assert used["mma"] == 0 < used["wgmma"], name
        assert row["blocks_per_sm"] * used["warps"] >= 8, name
        if row["kernel"] != "prepare_kernel":  # it has no loop over memory
            assert used["async_copies"] > 0, name

"""Every Triton kernel as the host code launches it, compiled for GPUs that are not there: it fits, and does not spill.

By the assembler that Triton runs. Bars: what a kernel that keeps to registers and tensor cores reaches.
"""

import json
import os
import subprocess
import sys
from functools import cache
from itertools import product

import pytest

pytest.importorskip("triton")

from tests.combinations import mostly_slow_rows
from tests.offline_gpu import SHARED_PER_BLOCK

LINEAR = [f"{family}/{kind}" for family in ("additive", "delta") for kind in ("constant", "scalar", "vector")]
OTHERS = ["scan/scalar", "scan/vector", "scan/matrix", "convolution/2", "convolution/4", "convolution/8"]
STACK = {"bfloat16": 64, "float16": 256, "float32": 256}
"""Bytes of local memory per thread: registers that are moved to memory and back."""
SPILLING: dict[tuple[int, str, int, str, str], int] = {
    (80, "bfloat16", 64, "delta/constant", "forward_kernel"): 96,
    (80, "bfloat16", 64, "delta/scalar", "forward_kernel"): 96,
    (80, "bfloat16", 64, "delta/vector", "grads_kernel"): 360,
    (80, "bfloat16", 128, "delta/constant", "forward_kernel"): 88,
    (80, "bfloat16", 128, "delta/scalar", "forward_kernel"): 88,
    (80, "bfloat16", 128, "delta/vector", "grads_kernel"): 352,
    (80, "float16", 64, "delta/scalar", "grads_kernel"): 280,
    (80, "float16", 128, "delta/constant", "forward_kernel"): 1280,
    (80, "float16", 128, "delta/scalar", "forward_kernel"): 1280,
    (80, "float16", 128, "delta/scalar", "grads_kernel"): 384,
    (80, "float16", 128, "delta/vector", "forward_kernel"): 4616,
    (80, "float32", 64, "additive/vector", "forward_kernel"): 296,
    (80, "float32", 64, "additive/vector", "backward_kernel"): 272,
    (80, "float32", 128, "additive/vector", "forward_kernel"): 10480,
    (80, "float32", 128, "additive/vector", "backward_kernel"): 840,
    (90, "bfloat16", 64, "delta/vector", "grads_kernel"): 168,
    (90, "bfloat16", 128, "delta/vector", "grads_kernel"): 176,
    (100, "bfloat16", 64, "delta/vector", "grads_kernel"): 200,
    (100, "bfloat16", 128, "additive/vector", "grads_kernel"): 72,
    (100, "bfloat16", 128, "delta/vector", "grads_kernel"): 200,
}
"""Kernels above that, by capability, dtype, head dim, case and kernel: the bytes that they take."""


@cache
def compiled(capability: int, dtype: str, dim: int, *arguments: str) -> list[dict]:
    command = [sys.executable, "-m", "tests.offline_gpu", "--resources-only", "--capability", str(capability)]
    done = subprocess.run(
        [*command, "--dtype", dtype, "--dim", str(dim), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(capability: int, dtype: str, dim: int, *arguments: str) -> None:
    if (capability, dtype, dim, *arguments) in REPRESENTATIVE:
        rows = compiled(90, "bfloat16", 128, *TOGETHER)
        found = [row for row in rows if (row["dtype"], row["dim"], row["case"]) == (dtype, dim, *arguments)]
    else:
        found = compiled(capability, dtype, dim, *arguments)
    assert found
    for row in found:
        assert "error" not in row, row
        used, where = row["resources"], (capability, dtype, dim, row["case"], row["kernel"])
        said = f"{where} {row['pass_']} {row['sizes']}"
        given_up = used["registers"] == 32 and used["stack"] > 0
        assert not given_up or where in SPILLING, f"the assembler keeps everything in memory: {said}"
        assert used["stack"] <= SPILLING.get(where, STACK[dtype]), said
        assert used["shared"] <= SHARED_PER_BLOCK[capability], said
        assert row["blocks_per_sm"] * used["warps"] >= 8, said
        if row["case"] in LINEAR and dtype == "bfloat16":
            assert used["wgmma" if capability >= 90 else "mma"] > 0, said
            walks = "grads" not in row["kernel"] and "prepare" not in row["kernel"]  # in a loop over memory
            assert used["async_copies"] > 0 or used["stages"] == 1 or not walks, said


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


REPRESENTATIVE = {
    (90, "bfloat16", 128, "delta/scalar"),
    (90, "float32", 64, "additive/scalar"),
    (90, "bfloat16", 128, "convolution/4"),
}
"""Compiled in every run; all others in `make test-all`."""
TOGETHER = ("delta/scalar", "additive/scalar/float32/64", "convolution/4")
"""The same as one call of the program names them."""
GRID = mostly_slow_rows(product((80, 90, 100), STACK, (64, 128), LINEAR), lambda *values: values in REPRESENTATIVE)


@pytest.mark.parametrize(("capability", "dtype", "dim", "case"), GRID)
def test_recurrences_keep_to_registers(capability, dtype, dim, case):
    check(capability, dtype, dim, case)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", LINEAR)
def test_packed_documents_keep_to_registers(case, capability):
    check(capability, "bfloat16", 128, "--document", "1000", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LINEAR[:2])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_normalizer_channel_beside_the_values_keeps_to_registers(case, capability):
    check(capability, "float32", 128, "--value-dim", "129", case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LINEAR[:2])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_head_dims_of_256_keep_to_registers(case, capability):
    check(capability, "bfloat16", 256, case)


@pytest.mark.parametrize(
    ("capability", "dtype", "cases"),
    [
        (90, "bfloat16", ("convolution/4",)),
        *(slow(capability, dtype, OTHERS) for capability in (80, 90, 100) for dtype in ("bfloat16", "float32")),
    ],
)
def test_scans_and_convolutions_keep_to_registers(capability, dtype, cases):
    check(capability, dtype, 128, *cases)

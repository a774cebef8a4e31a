"""The Triton kernels compiled for sm_90, which needs no GPU: that they compile, fit, and hardly spill registers."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from longctx.kernels import tuning

triton = pytest.importorskip("triton")

SPILLS = 400
"""Bytes of registers that a thread may move to memory and back: what the table's worst entry does, rounded up."""
SHARED = 227 * 1024
NUMBERS = {"heads": "i32", "batch": "i32"}
TOKENS = {"x", "y", "q", "k", "v", "dout", "out", "dq", "dk", "dv"}
GATES = {"terms_in", "terms_out", "dgate"}


def source(kernel, decay, key_dim, value_dim, blocks, documents, gate_grads, absent):
    """The kernel with the types and constants that triton_additive passes for contiguous bf16 tensors."""
    from triton import language as tl
    from triton.compiler import ASTSource

    constants = {
        **dict.fromkeys(("K_SHARE", "V_SHARE", "GATE_SHARE", "READERS", "X_SHARE", "Y_SHARE"), 1),
        "REVERSE": True,
        "K": key_dim,
        "V": value_dim,
        "KIND": decay,
        "C": blocks["chunk"],
        "BK": blocks["block_k"],
        "BV": blocks["block_v"],
        "DOT": tl.bfloat16,
        "PRECISION": "tf32",
    }
    missing = {*absent, *(() if documents else ("ids",)), *(() if gate_grads else (*GATES, "edges"))}
    aligned = [["tt.divisibility", 16]]
    signature, values, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in missing:
            signature[name], values[(place,)] = "constexpr", constants.get(name)
        elif name in NUMBERS:
            signature[name] = NUMBERS[name]
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            of_rows = name != "gate_strides" and name.removesuffix("_strides") not in GATES
            if of_rows or decay == "vector":
                attributes |= {(place, axis): aligned for axis in range(3)}
        else:
            signature[name] = "*bf16" if name in TOKENS else "*i32" if name in ("ids", "bounds") else "*fp32"
            attributes[(place,)] = aligned
    return ASTSource(kernel, signature, values, attributes)


def compile_all(decay, key_dim, value_dim):
    """Print a line per kernel: name, registers, bytes spilled, bytes of shared memory."""
    from triton.backends.compiler import GPUTarget

    from longctx.kernels.triton_additive_backward import dk_dv_kernel, dq_kernel
    from longctx.kernels.triton_additive_forward import apply_kernel, summary_kernel

    def blocks(name):
        return tuning.table(f"{name}/{decay}", key_dim, value_dim, torch.bfloat16, 90)

    together = blocks("dk_dv")
    fused = together["block_k"] >= key_dim and together["block_v"] >= value_dim
    kernels = {"summary": (summary_kernel, ()), "apply": (apply_kernel, ()), "dq": (dq_kernel, ())}
    kernels |= (
        {"dk_dv": (dk_dv_kernel, ())} if fused else {"dk": (dk_dv_kernel, ("dv",)), "dv": (dk_dv_kernel, ("dk",))}
    )
    for name, (kernel, absent) in kernels.items():
        sizes = blocks(name)
        compiled = triton.compile(
            source(kernel, decay, key_dim, value_dim, sizes, True, name not in ("dv", "summary"), absent),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": sizes["warps"], "num_stages": sizes["stages"]},
        )
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers, spilled = (re.search(p, said)[1] for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        sys.stdout.write(f"{name} {registers} {spilled} {compiled.metadata.shared}\n")


@pytest.mark.parametrize("decay", tuning.DECAYS)
@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(128, 128), *(pytest.param(k, v, marks=pytest.mark.slow) for k, v in [(64, 64), (48, 80), (256, 256)])],
)
def test_the_table_compiles_for_sm_90(decay, key_dim, value_dim, tmp_path):
    # Triton decides at import between the interpreter, which these tests run in, and the compiler.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    program = (
        f"from tests.kernels.test_triton_compile import compile_all; compile_all({decay!r}, {key_dim}, {value_dim})"
    )
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert {"summary", "apply", "dq"} < {name for name, *_ in lines}
    for name, *numbers in lines:
        _, spilled, shared = map(int, numbers)
        assert spilled <= SPILLS, f"{name}: {spilled} bytes spilled"
        assert shared <= SHARED, f"{name}: {shared} bytes of shared memory"

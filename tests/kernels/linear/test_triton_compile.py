"""The Triton kernels compiled for sm_90, which needs no GPU: that they compile, fit, and hardly spill registers."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from longctx.kernels.linear import tuning

triton = pytest.importorskip("triton")

SPILLS = {"additive": 400, "delta": 900}
"""Bytes of registers that a thread may move to memory and back: what the table's worst entry does, rounded up."""
SHARED = 227 * 1024
NUMBERS = {"heads", "batch", "chunks"}
PLACES = {"ids", "bounds"}
WIDE = {"gate", "beta", "states", "ends", "dends", "dstates", "transition", "state_out", "total_out", "end_terms"} | {
    "keeps_in",
    "keeps_out",
    "factors",
}
"""float32, as are those of GATES; all others are as the tokens."""
GATES = {"q_dq_in", "q_dq_out", "dgate", "dbeta"}


def source(kernel, decay, key_dim, value_dim, blocks, absent):
    """The kernel with the types and constants that the host passes for contiguous bf16 tensors."""
    from triton import language as tl
    from triton.compiler import ASTSource

    constants = {
        **dict.fromkeys((f"{x}_GROUP" for x in ("Q", "K", "V", "X", "Y", "GATE", "BETA")), 1),
        "READERS": 1,
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
    aligned = [["tt.divisibility", 16]]
    signature, values, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            signature[name], values[(place,)] = "constexpr", constants.get(name)
        elif name in NUMBERS:
            signature[name] = "i32"
        elif name.endswith("_strides"):
            signature[name] = ("i32", "i32", "i32")
            of_numbers = name.removesuffix("_strides") in {"gate", "beta", *GATES}
            if not of_numbers or (decay == "vector" and "beta" not in name):
                attributes |= {(place, axis): aligned for axis in range(3)}
        else:
            signature[name] = "*i32" if name in PLACES else "*fp32" if name in WIDE | GATES else "*bf16"
            attributes[(place,)] = aligned
    return ASTSource(kernel, signature, values, attributes)


def additive(decay, key_dim, value_dim):
    """Names in the table, kernels, and which of their arguments are absent."""
    from longctx.kernels.linear.additive.triton_backward import dk_dv_kernel, dq_kernel
    from longctx.kernels.linear.additive.triton_forward import apply_kernel, summary_kernel

    together = tuning.default_tiles(f"dk_dv/{decay}", key_dim, value_dim, torch.bfloat16, 90)
    yield "summary", summary_kernel, GATES
    yield "apply", apply_kernel, GATES
    yield "dq", dq_kernel, ()
    if together["block_k"] >= key_dim and together["block_v"] >= value_dim:
        yield "dk_dv", dk_dv_kernel, ()
    else:
        yield "dk", dk_dv_kernel, ("dv",)
        yield "dv", dk_dv_kernel, ("dk", "end_terms", *GATES)


def delta(decay, key_dim, value_dim):
    """The same of the delta rule, whose walks are those of a summary, of an output, and of the backward pass."""
    from longctx.kernels.linear.delta import triton_vector
    from longctx.kernels.linear.delta.triton_chunk_scan import backward_kernel, forward_kernel
    from longctx.kernels.linear.delta.triton_grads import grads_kernel, pair_grads_kernel
    from longctx.kernels.linear.delta.triton_prepare import prepare_kernel

    vector = decay == "vector"
    kept = ("chunk_states", "z_out", "chunk_dstates", "dv")
    other = ("factors",) if vector else ("decayed_k", "written_k", "decayed_q", "keeps_in")
    gates = ("dgate",) if decay == "constant" else ()
    yield "delta_prepare", triton_vector.prepare_kernel if vector else prepare_kernel, ()
    yield "delta_forward", forward_kernel, ("q", "scores", "decayed_q", "states", "out", *kept, *other)
    yield "delta_forward", forward_kernel, ("transition", *kept, *other)
    yield "delta_forward", forward_kernel, ("q", "scores", "decayed_q", "out", "ends", "transition", *other)
    yield "delta_backward", backward_kernel, ("dends", *kept, *other)
    yield "delta_backward", backward_kernel, ("transition", *other)
    if not vector:
        yield "delta_pairs", pair_grads_kernel, gates
    yield "delta_grads", triton_vector.grads_kernel if vector else grads_kernel, gates


def assembler():
    """The newest ptxas that Triton brings: it writes PTX of that one's version."""
    knobs = triton.knobs.nvidia
    tools = [getattr(knobs, name) for name in ("ptxas", "ptxas_blackwell") if hasattr(knobs, name)]
    return max(tools, key=lambda tool: tuple(map(int, tool.version.split(".")))).path


def compile_all(kernels, decay, key_dim, value_dim):
    """Print a line per kernel: name, registers, bytes spilled, bytes of shared memory."""
    from triton.backends.compiler import GPUTarget

    for name, kernel, absent in kernels(decay, key_dim, value_dim):
        sizes = tuning.default_tiles(f"{name}/{decay}", key_dim, value_dim, torch.bfloat16, 90)
        compiled = triton.compile(
            source(kernel, decay, key_dim, value_dim, sizes, absent),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": sizes["warps"], "num_stages": sizes["stages"]},
        )
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            command = [assembler(), "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers, spilled = (re.search(p, said)[1] for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
        sys.stdout.write(f"{name} {registers} {spilled} {compiled.metadata.shared}\n")


@pytest.mark.parametrize("kernels", [pytest.param(additive, marks=pytest.mark.slow), delta])
@pytest.mark.parametrize(
    "decay", [x if x == "scalar" else pytest.param(x, marks=pytest.mark.slow) for x in tuning.DECAY_KINDS]
)
@pytest.mark.parametrize(
    ("key_dim", "value_dim"),
    [(128, 128), *(pytest.param(k, v, marks=pytest.mark.slow) for k, v in [(64, 64), (48, 80), (256, 256)])],
)
def test_the_table_compiles_for_sm_90(kernels, decay, key_dim, value_dim, tmp_path):
    # Triton decides at import between the interpreter, which these tests run in, and the compiler.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    arguments = f"m.{kernels.__name__}, {decay!r}, {key_dim}, {value_dim}"
    program = f"import tests.kernels.linear.test_triton_compile as m; m.compile_all({arguments})"
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert len(lines) == sum(1 for _ in kernels(decay, key_dim, value_dim))
    for name, *numbers in lines:
        _, spilled, shared = map(int, numbers)
        assert spilled <= SPILLS[kernels.__name__], f"{name}: {spilled} bytes spilled"
        assert shared <= SHARED, f"{name}: {shared} bytes of shared memory"

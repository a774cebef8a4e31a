"""Compile the Triton kernels of block attention for a GPU that need not be there; a line a kernel, with the bytes of
shared memory that it takes: `python -m tests.kernels.attention.compile_triton 9.0 "64 128" "bf16 fp32"`."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longctx.kernels.attention import triton as attention_triton
from longctx.kernels.attention.triton import BACKWARD, FORWARD, tile_config

POINTERS = dict.fromkeys(("LSE", "DELTA"), "*fp32") | dict.fromkeys(("BEGIN", "END", "FIRST", "LAST"), "*i32")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(capability: str, head_dims: str, dtypes: str) -> None:
    major, minor = map(int, capability.split("."))
    for dtype in dtypes.split():
        for head_dim in map(int, head_dims.split()):
            for name, table in (("_forward_kernel", FORWARD), ("_dq_kernel", BACKWARD), ("_dkv_kernel", BACKWARD)):
                kernel = getattr(attention_triton, name)
                tile = tile_config(table, head_dim, DTYPES[dtype], (major, minor))
                size = max(16, triton.next_power_of_2(head_dim))
                constants = {
                    "K_PAD": size, "V_PAD": size, "TILE_Q": tile.queries, "TILE_K": tile.keys, "UPCAST": False,
                }  # fmt: skip
                signature, divisible = {}, {}
                for number, argument in enumerate(kernel.arg_names):
                    if argument in constants:
                        signature[argument] = "constexpr"
                    elif argument.isupper():
                        signature[argument] = POINTERS.get(argument, f"*{dtype}")
                    else:
                        signature[argument] = "fp32" if argument == "scale" else "i32"
                    # What Triton finds by itself at a launch: aligned tensors, strides and head dims.
                    if signature[argument].startswith("*") or argument[:2] in ("q_", "k_", "v_", "do"):
                        divisible[(number,)] = [["tt.divisibility", 16]]
                compiled = triton.compile(
                    ASTSource(kernel, signature, constants, divisible),
                    target=GPUTarget("cuda", major * 10 + minor, 32),
                    options={"num_warps": tile.warps, "num_stages": tile.stages},
                )
                sys.stdout.write(f"{name} {compiled.metadata.shared}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

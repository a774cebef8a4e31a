"""Steps that go wrong, each in its own way, and some that do not: what the runner of the GPU benchmark must outlive."""

import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_runner import Skip
from longctx.bench.isolated import report


def process() -> dict[str, Any]:
    return {"pid": os.getpid()}


def numbers(value: float) -> dict[str, Any]:
    report({"first": 1, "second": 1})
    report({"second": 2})
    os.write(1, b"some output\n")
    return {"value": value}


def fail() -> dict[str, Any]:
    report({"measured": 5})
    raise ValueError("the cause\nand more")


def hang(file: str) -> dict[str, Any]:
    """With a child that hangs, too."""
    child = subprocess.Popen(["sleep", "600"])
    Path(file).write_text(str(child.pid))
    report({"measured": 5})
    while True:
        time.sleep(0.1)


def segmentation_fault() -> dict[str, Any]:
    ctypes.string_at(0)
    return {}


def abort() -> dict[str, Any]:
    os.abort()


def killed() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leave() -> dict[str, Any]:
    raise SystemExit(3)


def device_assert() -> dict[str, Any]:
    raise RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")


def wrong() -> dict[str, Any]:
    return {"wrong": True, "error": "dq 1.0 (bound 1e-5)"}


def skipped() -> dict[str, Any]:
    raise Skip("fla is not installed")


def does_not_compile() -> dict[str, Any]:
    """A kernel that Triton's compiler refuses, for a GPU that is not there."""
    os.environ["TRITON_INTERPRET"] = "0"
    import torch
    import triton
    import triton.language as tl

    from tests.offline_gpu import record

    record(90)

    @triton.jit
    def kernel(x, N: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's language
        tl.static_assert(N == 1, "refused")
        tl.store(x, N)

    kernel[(1,)](torch.empty(1, device="meta"), N=2)
    return {}

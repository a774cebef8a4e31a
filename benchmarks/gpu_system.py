"""System steps of the GPU benchmark: the machine and its rates, the process group as the trainer makes it, tests."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu_runner import Skip
from longctx.bench.isolated import report


def machine(device: str) -> dict[str, Any]:
    """Describe the device and measure its rates: matmuls in bf16 and float32, copies (reads plus writes)."""
    import torch
    import triton

    from longctx.bench.rates import copy_rate
    from longctx.system import device_name, matmul_rate

    place = torch.device(device)
    result: dict[str, Any] = {
        "chip": device_name(place),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(place)
        result |= {
            "capability": 10 * properties.major + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    report(result)
    report({"copy_bytes_per_second": copy_rate(place, torch.bfloat16)})
    report({"bf16_flops_per_second": matmul_rate(place, torch.bfloat16)})
    report({"fp32_flops_per_second": matmul_rate(place, torch.float32)})
    return {}


@contextmanager
def own_environment() -> Iterator[None]:
    """Undo changes of the environment at the end: a process group's variables would make the next run a rank."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def process_group(device: str) -> dict[str, Any]:
    """Make the trainer's process group and device mesh on one rank, and call a collective of each kind."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from longctx.parallel.mesh import Mesh
    from longctx.train.process_group import process_group as trainers

    with own_environment():
        report({"stage": "process group"})
        with trainers(device, 30):
            report({"stage": "device mesh"})
            init_device_mesh(device, (1, 1, 1), mesh_dim_names=("replicate", "shard", "cp"))
            Mesh.build(device)
            report({"stage": "collectives"})
            x = torch.ones(4, device=device)
            dist.all_reduce(x)
            dist.all_gather_into_tensor(torch.empty(4, device=device), x)
            objects = [None]
            dist.all_gather_object(objects, 1)
            dist.barrier()
            assert x.sum() == 4
            report({"stage": "end"})
    return {"stage": "passed"}


def command(*arguments: str, on_line: Callable[[str], None] | None = None) -> str:
    """Run a program; return its output, which goes to the log as it comes, and line by line to `on_line`.

    Ends with this process, which the runner limits in time. Raises RuntimeError, with the end of the output, where the
    program fails.
    """
    print("+", *arguments, flush=True)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    lines = []
    with subprocess.Popen(arguments, **pipes) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
            if on_line is not None:
                on_line(line)
    if process.returncode:
        last = " | ".join(line.strip() for line in lines[-3:])
        raise RuntimeError(f"status {process.returncode}: {last[-400:]}")
    return "".join(lines)


def longctx(*arguments: str) -> str:
    """Run a command of longctx; return its output."""
    return command(sys.executable, "-m", "longctx", *arguments)


def tests(path: str, keyword: str) -> dict[str, Any]:
    """Run the tests of a file that match `keyword` ("" for all), on the GPU where there is one."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{' and '.join(missing)} not installed")
    # Without the settings in pyproject.toml, whose plugins may not be installed.
    settings = ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "--import-mode=importlib", "-v"]
    warnings = ["-W", "ignore::pytest.PytestUnknownMarkWarning"]
    chosen = ["-k", keyword] if keyword else []
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)

    def count(line: str) -> None:
        found = re.search(r"::\S.* (PASSED|FAILED|SKIPPED|ERROR)", line)
        if found is not None:
            counts[{"ERROR": "failed"}.get(found[1], found[1].lower())] += 1
            report({"tests": ", ".join(f"{number} {word}" for word, number in counts.items() if number)})

    command(sys.executable, "-m", "pytest", *settings, *warnings, "-m", "not slow", *chosen, path, on_line=count)
    return {}


def verify(recipe: str, overrides: tuple[str, ...], ranks: int) -> dict[str, Any]:
    """Run `longctx verify` on a recipe, shrunk, over ranks; return its last line."""
    output = longctx("verify", recipe, *overrides, "--shrink", "--ranks", str(ranks))
    return {"verdict": output.strip().splitlines()[-1]}

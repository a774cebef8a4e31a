"""Kernels compiled without a GPU: `benchmarks/gpu-offline.md`, what every kernel takes, ours and fla's.

    python -m benchmarks.gpu_offline [--peers DIR] [--only PATTERN] [--workers N] [--results DIR]

The launches are those of real calls, recorded and compiled by `tests/offline_gpu.py` with the assembler that Triton
runs; nothing is run. fla, in the folder DIR, is compiled the same way, each kernel in the configuration that is nearest
to blocks of 64, 4 warps and 3 stages: it would tune on a GPU.
"""

import argparse
import fnmatch
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_plan import KINDS, PEERS
from benchmarks.gpu_runner import Phase, Results, Step, run
from benchmarks.gpu_table import read

PAGE = Path(__file__).with_name("gpu-offline.md")
OTHERS = (
    ("bfloat16", "convolution/4"), ("float32", "convolution/4"), ("float32", "scan/scalar"), ("float32", "scan/vector"),
    ("float32", "scan/matrix"),
)  # fmt: skip
"""Kernels beside the recurrences: dtype, and family and kind of `tests.offline_gpu.Case`."""
CAPABILITIES = (80, 90, 100)
DIMS = (128, 64)
DTYPES = ("bfloat16", "float32")
TOKENS, HEADS = 65536, 16
SECONDS = 900.0
"""For the kernels of one recurrence."""
COLUMNS = (
    "pass", "kernel", "tiles", "programs", "warps x stages", "registers", "stack", "shared", "warps/SM", "wgmma", "mma",
    "of them tf32", "async copies", "instructions", "in the loop", "barriers in the loop",
)  # fmt: skip


@cache
def _launches(capability: int) -> list[Any]:
    """Record launches from now on; once a process, which cannot go back."""
    from longctx.kernels.linear import tuning
    from tests import offline_gpu

    tuning._compute_capability = lambda device: capability  # type: ignore[assignment]
    return offline_gpu.record(capability)


def _cells(pass_: str, launch: Any, tiles: Sequence[Any], capability: int) -> list[str]:
    from tests.offline_gpu import blocks_per_sm

    used, programs = launch.resources(), math.prod(launch.grid)
    sizes = "/".join("-" if size is None else str(size) for size in tiles)
    numbers = (
        used.registers, used.stack, used.shared, blocks_per_sm(used, capability) * used.warps, used.wgmma, used.mma,
        used.tf32, used.async_copies, used.instructions, used.loop_instructions, used.loop_barriers,
    )  # fmt: skip
    return [pass_, launch.kernel, sizes, str(programs), f"{used.warps}x{used.stages}", *map(str, numbers)]


def ours(kind: str, dim: int, dtype: str, capability: int) -> dict[str, Any]:
    """Compile the kernels of a recurrence or of OTHERS; return their rows.

    A pass that does not compile is a row with its error.
    """
    import torch

    from tests import offline_gpu

    family, decay = kind.split("/")
    # Of the delta rule, a constant decay stands for none.
    case = offline_gpu.Case(
        family, "constant" if decay == "none" else decay, dim, dim, getattr(torch, dtype), TOKENS, HEADS
    )
    launches, rows = _launches(capability), []
    for pass_, call in offline_gpu.PASSES[family](case):
        launches.clear()
        error = _tried(call)
        for launch, tiles in _different(launches, ("C", "BK", "BV")):
            rows.append(_cells(pass_, launch, tiles, capability))
        if error is not None:
            rows.append([pass_, error])
    return {"rows": rows}


def _tried(call: Any) -> str | None:
    """Call, and return the error, if there is one, in a line."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the compiler's, of any class: a row of the table
        return f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return None


def _different(launches: Sequence[Any], names: Sequence[str]) -> Iterable[tuple[Any, tuple[Any, ...]]]:
    """Return each kernel once for each of its tile sizes, in the order of the launches."""
    seen: dict[tuple[str, tuple[Any, ...]], Any] = {}
    for launch in launches:
        tiles = tuple(launch.constants.get(name) for name in names)
        seen.setdefault((launch.kernel, tiles), launch)
    return [(launch, tiles) for (_, tiles), launch in seen.items()]


def peer(kind: str, dim: int, capability: int, folder: str) -> dict[str, Any]:
    """Compile fla's kernels for a recurrence, forward and backward; return their rows."""
    import torch

    from benchmarks.gpu_peers import fla

    if folder not in sys.path:
        sys.path.append(folder)
    _pretend(capability)
    launches = _launches(capability)
    inputs = _inputs(kind, dim)
    call, rows = fla(kind), []
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, *(g for g in inputs.gates if g.dim() > 1))]
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        outputs.append(call(inputs))

    def backward() -> None:
        torch.autograd.grad(outputs, leaves, [inputs.do])

    for pass_, go in (("forward", forward), ("backward", backward)):
        launches.clear()
        error = _tried(go)
        for launch, tiles in _different(launches, ("BT", "BK", "BV")):
            rows.append(_cells(pass_, launch, tiles, capability))
        if error is not None:
            return {"rows": [*rows, [pass_, error]]}
    return {"rows": rows}


def _inputs(kind: str, dim: int) -> Any:
    """Return a recurrence's inputs in bf16, without memory."""
    import torch

    from benchmarks.gpu_recurrences import Inputs

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    tokens, (recurrence, decay) = (1, TOKENS, HEADS), kind.split("/")
    q, k, v, do = (empty(*tokens, dim, dtype=torch.bfloat16) for _ in range(4))
    sizes = {"constant": (HEADS,), "scalar": tokens, "vector": (*tokens, dim)}
    gates = [empty(*tokens)] if recurrence == "delta" else []
    gates += [empty(*sizes[decay])] if decay in sizes else []
    return Inputs(kind, q, k, v, tuple(gates), do)


def _pretend(capability: int) -> None:
    """Answer what fla asks of torch.cuda as a GPU would, and take one configuration where it would tune."""
    import torch
    from triton.runtime.autotuner import Autotuner

    from benchmarks.gpu_peers import distance
    from tests.offline_gpu import SHARED_PER_BLOCK

    cuda: Any = torch.cuda
    if cuda.is_available() and getattr(cuda, "pretends", False):
        return
    properties = {"multi_processor_count": 132, "shared_memory_per_block_optin": SHARED_PER_BLOCK[capability]}
    cuda.pretends = True
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    cuda.get_device_name = lambda device=None: "NVIDIA H100" if capability == 90 else f"NVIDIA sm_{capability}"
    cuda.get_device_properties = lambda device=None: type("Properties", (), properties)()
    cuda.device = lambda device: nullcontext()
    search = Autotuner.run

    def one(tuner: Any, *arguments: Any, **named: Any) -> Any:
        tuner.configs = sorted(tuner.configs, key=lambda x: distance(x.kwargs, x.num_warps, x.num_stages or 3))[:1]
        return search(tuner, *arguments, **named)

    Autotuner.run = one


def phases(peers: str | None, workers: int) -> list[Phase]:
    """Return the steps, a phase for each capability: a process compiles for one."""
    module, found = "benchmarks.gpu_offline", []
    for capability in CAPABILITIES:
        steps = [
            Step(f"{kind}/{dtype}/{dim}/sm_{capability}", f"{module}:ours", (kind, dim, dtype, capability), SECONDS)
            for dtype in DTYPES
            for dim in DIMS
            for kind in (*KINDS, *(other for its_dtype, other in OTHERS if its_dtype == dtype))
        ]
        theirs = [
            Step(
                f"fla/{kind}/bfloat16/{dim}/sm_{capability}", f"{module}:peer", (kind, dim, capability, peers), SECONDS
            )
            for dim in DIMS
            for kind in PEERS
            if peers is not None
        ]
        found.append(Phase(f"sm_{capability}", float("inf"), tuple(steps), workers))
        found.append(Phase(f"fla, sm_{capability}", float("inf"), tuple(theirs), workers))
    return found


def render(rows: Sequence[dict[str, Any]], versions: str) -> str:
    """Return the page: a table for each architecture, dtype and head dim."""
    text = f"""# Kernels, compiled without a GPU

Written by `python -m benchmarks.gpu_offline`, with {versions}. Nothing was run for this page;
times on a GPU are in [gpu/README.md](gpu/README.md). One sequence of {TOKENS:,} tokens, {HEADS} heads.
Tiles: tokens of a chunk, channels of K and of V, of a program.
Registers are of a thread (32 with a stack: the assembler gave up, and all is in local memory); stack is local memory in
bytes of a thread; shared is memory in bytes of a program; warps/SM are those that a multiprocessor holds at a time.
wgmma: matmul instructions of warpgroups, on sm_100 those of the fifth generation; mma: of warps. The loop is the
largest.
"""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        *name, dtype, dim, architecture = row["step"].split("/")
        groups.setdefault((architecture, dtype, dim, "fla" if name[0] == "fla" else "longctx"), []).append(row)
    for (architecture, dtype, dim, whose), members in groups.items():
        text += f"\n## {whose}, {architecture}, {dtype}, head dim {dim}\n\n"
        lines = [("recurrence", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
        for row in members:
            kind = row["step"].removeprefix("fla/").split(f"/{dtype}")[0]
            kernels = row.get("rows") or [["", f"{row['status']}: {row.get('error') or row.get('reason')}"]]
            lines += [(kind, *cells, *[""] * (len(COLUMNS) - len(cells))) for cells in kernels]
        text += "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, and write the page; return 1 if a step did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="DIR", help="folder with fla and einops; without it, only ours")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="only these, e.g. 'delta/*/sm_90'")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument(
        "--results", metavar="DIR", help="keep each result there, and resume from those of an earlier run"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write")
    chosen = parser.parse_args(arguments)
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import triton

    patterns, plan = chosen.only or ["*"], phases(chosen.peers, chosen.workers)
    if chosen.results:
        Path(chosen.results).mkdir(parents=True, exist_ok=True)
    with nullcontext(chosen.results) if chosen.results else tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder), "offline")
        kept = {row["step"]: row for row in read(results.file) if row["status"] == "ok"} if chosen.results else {}

        def wanted(step: Step) -> bool:
            return step.name not in kept and any(fnmatch.fnmatch(step.name, pattern) for pattern in patterns)

        failed = run([replace(phase, steps=tuple(filter(wanted, phase.steps))) for phase in plan], results)
        # In the order of the plan: with several processes, results come in another.
        order = [step.name for phase in plan for step in phase.steps]
        rows = [row for row in (*kept.values(), *results.rows) if row["step"] in order]
        rows.sort(key=lambda row: order.index(row["step"]))
    chosen.page.write_text(render(rows, f"torch {torch.__version__}, triton {triton.__version__}"), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

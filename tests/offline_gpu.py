"""Triton kernels compiled for a GPU that is not there: launches of the host code, recorded by a driver that runs none.

Shapes, strides, alignment and constants are those of a real call, on tensors without memory (device "meta"), and the
assembler is the one that Triton runs. Needs a process in which Triton does not interpret (TRITON_INTERPRET=0), so tests
call it as a program, which prints a JSON object per kernel:

    TRITON_INTERPRET=0 python -m tests.offline_gpu --capability 90 --dim 128 --dtype bfloat16 additive/scalar

Cases are compiled in every dtype and head dim that is asked for; one may name its own: additive/scalar/float32/64.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.compiler import compiler

SHARED_PER_BLOCK = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Largest dynamic shared memory of a block, in bytes, by compute capability (CUDA C++ Programming Guide, table 24)."""
_SHARED_PER_SM = {80: 167936, 86: 102400, 89: 102400, 90: 233472, 100: 233472, 120: 102400}
_WARPS_PER_SM = {86: 48, 89: 48, 120: 48}
_REGISTERS_PER_SM = 65536
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SEGMENT = 2048


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes, read from its PTX and its machine code."""

    registers: int
    """Per thread. 32 with a stack: ptxas has given up and keeps everything in local memory."""
    stack: int
    """Bytes of local memory per thread."""
    shared: int
    """Bytes of shared memory per block."""
    warps: int
    stages: int
    wgmma: int
    """Warpgroup matmul instructions in PTX (sm_90), or those of the fifth generation (sm_100)."""
    mma: int
    """Warp-level matmul instructions in PTX."""
    tf32: int
    """Matmul instructions in PTX with tf32 factors."""
    async_copies: int
    instructions: int | None = None
    """None, as the following, where the machine code was not disassembled."""
    loop_instructions: int | None = None
    """Instructions of the largest loop."""
    loop_barriers: int | None = None
    loop_mix: dict[str, int] = field(default_factory=dict)
    """Instructions of the largest loop by opcode."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    compiled: Any

    def resources(self, disassemble: bool = True) -> Resources:
        """Read the compiled kernel's resources; `disassemble`, half a second, adds its instructions and loops."""
        return _resources(self.compiled, disassemble)


class _Driver(CudaDriver):
    """A CUDA driver without CUDA: loads nothing, and records launches."""

    def __init__(self, capability: int, launches: list[Launch]) -> None:
        self.utils = _Utils(capability)
        self.launcher_cls = lambda source, metadata: _Recorder(source, metadata, launches)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device=0: divmod(capability, 10)
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Utils:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_PER_BLOCK[self.capability],
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": _REGISTERS_PER_SM,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }


class _Recorder:
    """Stands for a compiled launcher."""

    def __init__(self, source: Any, metadata: Any, launches: list[Launch]) -> None:
        self.source, self.metadata, self.launches = source, metadata, launches
        self.compiled: Any = None

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        names = self.source.fn.arg_names
        constants = {names[at[0]]: value for at, value in self.source.constants.items() if len(at) == 1}
        self.launches.append(Launch(self.metadata.name, (x, y, z), constants, self.compiled))


def record(capability: int) -> list[Launch]:
    """Make Triton compile for a compute capability (90 for sm_90) from now on; the list returned gets every launch."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton's kernels are interpreted in this process: set TRITON_INTERPRET=0")
    launches: list[Launch] = []
    triton.runtime.driver.set_active(_Driver(capability, launches))
    compiler.max_shared_mem = lambda device: 1 << 30  # recorded, and not refused
    initialise = compiler.CompiledKernel._init_handles

    def remember(kernel: Any) -> None:
        initialise(kernel)
        if isinstance(kernel._run, _Recorder):
            kernel._run.compiled = kernel

    compiler.CompiledKernel._init_handles = remember
    return launches


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _largest_loop(machine_code: str) -> list[str]:
    """Return the instructions of the longest backward branch's body."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?);", machine_code, re.MULTILINE)
    instructions = [(int(at, 16), text.strip()) for at, text in found]
    loops = []
    for at, text in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    if not loops:
        return []
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    return [text for at, text in instructions if begin <= at <= end]


def _opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def _resources(compiled: Any, disassemble: bool) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _run(TOOLS / "cuobjdump", "-res-usage", cubin))
        assert usage is not None
        machine_code = _run(TOOLS / "cuobjdump", "-sass", cubin) if disassemble else None
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        wgmma=len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        tf32=len(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[^;]*tf32", ptx)),
        async_copies=len(re.findall(r"cp\.async\.(?:cg|ca)|cp\.async\.bulk", ptx)),
        **({} if machine_code is None else _instructions(machine_code)),
    )


def _instructions(machine_code: str) -> dict[str, Any]:
    loop = _largest_loop(machine_code)
    mix = Counter(map(_opcode, loop))
    return {
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,6}\*/\s+\S", machine_code, re.MULTILINE)),
        "loop_instructions": len(loop),
        "loop_barriers": mix["BAR"],
        "loop_mix": dict(mix.most_common()),
    }


def blocks_per_sm(used: Resources, capability: int) -> int:
    """Return how many blocks of a kernel fit a multiprocessor at a time, by registers, shared memory and warps."""
    per_warp = -(-used.registers * 32 // 256) * 256
    by_registers = _REGISTERS_PER_SM // per_warp // 4 * 4 // used.warps
    by_shared = _SHARED_PER_SM[capability] // (used.shared + 1024)
    return min(by_registers, by_shared, _WARPS_PER_SM.get(capability, 64) // used.warps, 32)


@dataclass(frozen=True)
class Case:
    """One call: a family of kernels (PASSES), the kind of decay or transition, sizes."""

    family: str
    kind: str
    key_dim: int = 128
    value_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 65536
    heads: int = 16
    document: int = 0
    """Tokens per document; 0 for one document."""

    def inputs(self) -> Any:
        """Return the recurrence's inputs, without memory."""
        from longctx.kernels.linear.recurrence import Inputs

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        tokens = (1, self.tokens, self.heads)
        q, k = (empty(*tokens, self.key_dim, dtype=self.dtype) for _ in range(2))
        v = empty(*tokens, self.value_dim, dtype=self.dtype)
        decays = {"constant": (self.heads,), "scalar": tokens, "vector": (*tokens, self.key_dim)}
        gates = [empty(*tokens)] if self.family == "delta" else []
        if self.kind != "constant" or self.family == "additive":
            gates.append(empty(*decays[self.kind]))
        return Inputs(q, k, v, tuple(gates))

    def segments(self) -> Any:
        """Return the tokens cut into segments of SEGMENT tokens."""
        from longctx.kernels.linear.recurrence import Segment

        starts = tuple(range(self.document, self.tokens, self.document)) if self.document else ()
        return Segment(0, self.tokens, starts).cut(SEGMENT)


def recurrence_passes(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the passes of a linear recurrence."""
    from longctx.kernels.linear.additive import triton as additive
    from longctx.kernels.linear.delta import triton as delta

    module: Any = {"additive": additive, "delta": delta}[case.family]
    inputs, segments = case.inputs(), case.segments()
    do = torch.empty_like(inputs.v)
    states = torch.empty(len(segments), *inputs.state_shape, device="meta")
    gate_grads = case.kind != "constant" or case.family == "delta"
    yield "summarize", lambda: module.summarize(inputs, segments)
    yield "apply", lambda: module.apply(inputs, segments, states)
    yield "summarize_grad", lambda: module.summarize_grad(inputs, segments, do)
    yield "apply_grad", lambda: module.apply_grad(inputs, segments, do, states, states, gate_grads)


def scan_passes(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the scan over segments, of transitions that are scalars, vectors or matrices."""
    from longctx.kernels.linear import triton_segment_scan as scan

    lead = len(case.segments()), 1, case.heads
    state = torch.empty(*lead, case.key_dim, case.value_dim, device="meta")
    dims = {"scalar": (), "vector": (case.key_dim,), "matrix": (case.key_dim, case.key_dim)}[case.kind]
    transition = torch.empty(*lead, *dims, device="meta")
    if case.kind == "matrix":
        yield "scan", lambda: scan.scan_matrices(transition, state, state[0], False)
        yield "compose", lambda: scan.compose_matrices(transition, state, False)
    else:
        yield "scan", lambda: scan.scan_segments_triton(transition, state, state[0], False)


def convolution_passes(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the convolution forward and backward; the kind is the number of taps."""
    from longctx.kernels import triton_convolution as convolution

    taps, channels = int(case.kind), case.heads * case.key_dim
    x = torch.empty(1, case.tokens, channels, dtype=case.dtype, device="meta")
    weight, before = x.new_empty(channels, taps), x.new_empty(1, 1, taps - 1, channels)
    starts = tuple(range(0, case.tokens, case.document)) if case.document else ()
    rest = before, (0, case.tokens), starts, "silu"
    yield "forward", lambda: convolution.forward(x, weight, None, *rest)
    yield "backward", lambda: convolution.backward(x, x, weight, None, *rest)


PASSES = {
    "additive": recurrence_passes,
    "delta": recurrence_passes,
    "scan": scan_passes,
    "convolution": convolution_passes,
}


@dataclass(frozen=True)
class Row:
    """One kernel of one pass of a case, with its tile sizes, programs and resources."""

    case: str
    pass_: str
    kernel: str
    sizes: dict[str, int]
    """Constants of the launch that are numbers: tiles, head dims, groups."""
    programs: int
    blocks_per_sm: int
    resources: Resources

    @property
    def warps_per_sm(self) -> int:
        """Warps of this kernel that a multiprocessor holds at a time."""
        return self.blocks_per_sm * self.resources.warps


def rows(case: Case, capability: int, launches: list[Launch], disassemble: bool = True) -> Iterator[Row]:
    """Compile every kernel of a case; `launches` is what `record(capability)` returned. Errors are the compiler's."""
    name = f"{case.family}/{case.kind}"
    for pass_, run in PASSES[case.family](case):
        launches.clear()
        run()
        seen: list[tuple[str, dict[str, Any]]] = []
        for launch in list(launches):
            if (launch.kernel, launch.constants) in seen:
                continue
            seen.append((launch.kernel, launch.constants))
            sizes = {key: value for key, value in launch.constants.items() if isinstance(value, int)}
            used = launch.resources(disassemble)
            programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
            yield Row(name, pass_, launch.kernel, sizes, programs, blocks_per_sm(used, capability), used)


def main() -> None:
    """Print a JSON object per kernel of the cases, or with "error" where one does not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dim", type=int, action="append", help="K and V; default 128")
    parser.add_argument("--value-dim", type=int, help="V, where it is not K")
    parser.add_argument("--dtype", action="append", help="default bfloat16")
    parser.add_argument("--document", type=int, default=0, help="tokens per document")
    parser.add_argument("--resources-only", action="store_true", help="without counts of instructions: faster")
    parser.add_argument("cases", nargs="+", metavar="FAMILY/KIND[/DTYPE/DIM]")
    arguments = parser.parse_args()
    from longctx.kernels.linear import tuning

    tuning._compute_capability = lambda device: arguments.capability
    launches = record(arguments.capability)
    named = [name.split("/") for name in arguments.cases]
    asked = product(arguments.dtype or ["bfloat16"], arguments.dim or [128], [name for name in named if len(name) == 2])
    own = ((dtype, int(dim), (family, kind)) for family, kind, dtype, dim in (name for name in named if len(name) == 4))
    for dtype, dim, (family, kind) in chain(asked, own):
        value_dim = arguments.value_dim or dim
        case = Case(family, kind, dim, value_dim, getattr(torch, dtype), document=arguments.document)
        common = {"dtype": dtype, "dim": dim, "capability": arguments.capability}
        try:
            for row in rows(case, arguments.capability, launches, not arguments.resources_only):
                sys.stdout.write(json.dumps({**common, **asdict(row)}) + "\n")
                sys.stdout.flush()
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is a result
            text = f"{type(error).__name__}: {str(error)[:500]}"
            sys.stdout.write(json.dumps({**common, "case": f"{family}/{kind}", "error": text}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

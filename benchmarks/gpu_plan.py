"""GPU benchmark: the steps of each part, in order, with their time limits. `bash benchmarks/gpu.sh` runs it.

    python -m benchmarks.gpu_plan [--tune | --nccl | --verify] [--rehearse] [--only PATTERN] [--out DIR]

docs/gpu.md says what each step gives.
"""

import argparse
import datetime
import fnmatch
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_runner import Phase, Results, Step, run
from benchmarks.gpu_shape import Shape
from longctx.parallel.one_machine import job_folder

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 570.0
"""Seconds of a part: under the 10 minutes for which a GPU may be lent."""
FP32 = "float32"
ATTENTION_TESTS = (
    "tests/kernels/attention/test_backends.py", "(test_every_backend_of_a_gpu or repeat_bitwise) and not flex",
)  # fmt: skip
GPU_TESTS = (
    "tests/kernels/linear/additive/test_triton.py",
    "tests/kernels/linear/delta/test_triton.py",
    "tests/kernels/linear/test_segment_scan.py",
    "tests/kernels/attention/test_triton.py",
    "tests/kernels/attention/test_backends.py",
)
"""Files whose tests run on a GPU where there is one."""
KINDS = (
    "additive/constant", "additive/scalar", "additive/vector", "delta/none", "delta/scalar", "delta/vector",
)  # fmt: skip
POINTWISE = ("rms-norm", "gated-rms-norm", "swiglu", "rotary", "cross-entropy", "convolution")
TIMED = tuple(kind for kind in KINDS if kind != "delta/none")
PEERS = ("additive/scalar", "delta/scalar", "additive/constant", "additive/vector", "delta/vector")
"""In order of importance: the last ones run where time is left."""


@dataclass(frozen=True)
class Sizes:
    """All that a rehearsal on a CPU does differently."""

    device: str
    half: str
    """The 16-bit dtype: Triton's interpreter cannot multiply bf16."""
    workers: int
    """Processes that compile at a time."""
    checkers: int
    shapes: tuple[tuple[int, int, int], ...]
    """Tokens, heads and head dim of what is timed; the last one is long."""
    small: tuple[int, int, int]
    """The first one with half the head dim."""
    compiled: int
    """Tokens of the runs that compile: as many segments as what is timed has, since Triton compiles a kernel anew where
    a number is no longer a multiple of 16."""
    head_major: tuple[int, int, int]
    last: int
    """Tokens at the end that are compared where there are many."""
    segments: int
    """Of the scan."""
    pointwise: tuple[int, int, int]
    """Rows that are checked, rows that are timed, channels."""
    repeats: int
    candidates: int
    """Tile sizes that are tuned per kernel."""
    training: tuple[str, ...]
    """Overrides of benchmarks/gpu-1b.toml."""
    tokens: tuple[int, int]
    """Sequence lengths from which the longest is extrapolated; training runs at the second."""
    corpus: str
    prompt: int
    messages: tuple[int, ...]
    """Bytes of the collectives."""
    ranks: int
    patience: float = 1.0
    """Factor of the time limits of steps."""


GPU = Sizes(
    device="cuda",
    half="bfloat16",
    workers=min(16, os.cpu_count() or 1),
    checkers=8,
    shapes=((65536, 16, 128), (8192, 64, 128), (1048576, 8, 128)),
    small=(65536, 16, 64),
    compiled=32768,
    head_major=(262144, 18, 128),
    last=32768,
    segments=512,
    pointwise=(4096, 65536, 2048),
    repeats=10,
    candidates=12,
    training=(),
    tokens=(32768, 65536),
    corpus="",
    prompt=16384,
    messages=(2**16, 2**20, 2**24, 2**28),
    ranks=1,
)
REHEARSAL = Sizes(
    device="cpu",
    half="float16",
    workers=2,
    checkers=2,
    shapes=((40, 1, 16), (24, 2, 16), (48, 1, 16)),
    small=(36, 1, 8),
    compiled=20,
    head_major=(20, 2, 16),
    last=16,
    segments=5,
    pointwise=(20, 40, 128),
    repeats=1,
    candidates=1,
    training=(
        "model.dim=64", "model.depth=4", "model.lightning.heads=2", "model.softmax.heads=4", "model.softmax.kv_heads=2",
        "train.steps=2", "train.ffn_tile=64",
    ),
    tokens=(128, 256),
    corpus="json",
    prompt=100,
    messages=(4096,),
    ranks=2,
    patience=4.0,
)  # fmt: skip


def _steps(*steps: Step, at: Sizes) -> tuple[Step, ...]:
    return tuple(replace(step, seconds=at.patience * step.seconds) for step in steps)


def first_part(at: Sizes, work: str) -> list[Phase]:
    """The first 10 minutes: compile, check, time, train, and compare with fla."""
    kernels, pointwise, device = "benchmarks.gpu_kernels", "benchmarks.gpu_pointwise", at.device
    first, _, long = shapes = [Shape(*sizes) for sizes in at.shapes]
    small = Shape(*at.small)
    few, many, width = at.pointwise

    system = [
        Step("system", "benchmarks.gpu_system:machine", (device,), 40),
        Step("process-group", "benchmarks.gpu_system:process_group", (device,), 20),
    ]
    # The longest first.
    compiled = [Step("corpus", "benchmarks.gpu_train:corpus", (work, at.corpus), 90)]
    for dtype, like in ((at.half, first), (FP32, first), (at.half, small), (FP32, small)):
        short = replace(like, tokens=at.compiled)
        compiled += [
            Step(f"compile/{kind}/{dtype}/{like}", f"{kernels}:compile_recurrence", (kind, dtype, short, device), 90)
            for kind in reversed(KINDS)
        ]
        name = f"compile/attention/{dtype}/{like}"
        compiled.append(Step(name, f"{kernels}:compile_attention", (dtype, short, device), 90))

    compiled += [
        Step(f"check/{name}/{dtype}", f"{pointwise}:check_pointwise", (name, dtype, few, width, device), 90)
        for name in POINTWISE
        for dtype in (at.half, FP32)
    ]

    compiled += [
        Step(f"compile/peer/{kind}", "benchmarks.gpu_peers:compile_peer",
             (kind, at.half, replace(first, tokens=at.compiled), device), 90)
        for kind in PEERS
    ]  # fmt: skip

    # The longest first.
    checked = [Step("pytest/attention", "benchmarks.gpu_system:tests", ATTENTION_TESTS, 70)]
    for dtype, like, packed in (
        (at.half, first, False), (FP32, first, False), (at.half, shapes[1], False),
        (at.half, small, True), (FP32, small, True),
    ):  # fmt: skip
        if packed:
            # Vector decays in float64 take a millisecond per chunk and document.
            like = replace(like, tokens=max(1, like.tokens // 4))
        checked += [
            Step(
                f"check/{kind}/{dtype}/{like}{'/documents' if packed else ''}",
                f"{kernels}:check_recurrence", (kind, dtype, like, device, packed), 40,
            )
            for kind in KINDS
        ]  # fmt: skip
        if not packed and like is first:
            checked.append(
                Step(f"check/attention/{dtype}/{like}", f"{kernels}:check_attention", (dtype, like, device), 40)
            )
    checked += [
        Step(f"check/scan/{kind}", f"{kernels}:check_scan", (kind, at.segments, long, device), 30)
        for kind in ("scalar", "vector", "matrix")
    ]
    apart = Shape(*at.head_major)
    far = [
        Step(
            f"check/{kind}/head-major/{apart}",
            f"{kernels}:check_head_major",
            (kind, at.half, apart, device, at.last),
            40,
        )
        for kind in ("additive/scalar", "additive/vector", "delta/scalar")
    ]
    far += [
        Step(
            f"check/{kind}/{at.half}/{long}",
            f"{kernels}:check_recurrence",
            (kind, at.half, long, device, False, at.last),
            40,
        )
        for kind in KINDS
    ]

    timed = [
        Step(
            f"time/{kind}/{at.half}/{like}", f"{kernels}:time_recurrence", (kind, at.half, like, device, at.repeats), 30
        )
        for like in shapes
        for kind in TIMED
    ]
    timed.append(
        Step(f"time/attention/{at.half}/{first}", f"{kernels}:time_attention", (at.half, first, device, at.repeats), 30)
    )
    timed += [
        Step(f"time/{kind}/{FP32}/{first}", f"{kernels}:time_recurrence", (kind, FP32, first, device, at.repeats), 30)
        for kind in TIMED
    ]
    timed += [
        Step(
            f"time/{name}/{at.half}",
            f"{pointwise}:time_pointwise",
            (name, at.half, many, width, device, at.repeats),
            30,
        )
        for name in POINTWISE
    ]
    return [
        # torch's first import, from a disk that nobody has read, may take half of it.
        Phase("system", 45, _steps(*system, at=at)),
        Phase("compile", 140, _steps(*compiled, at=at), at.workers),
        # The long ones take up to 27 GiB each.
        Phase("check", 200, _steps(*checked, at=at), at.checkers),
        Phase("check, long", 275, _steps(*far, at=at), min(2, at.checkers)),
        Phase("time", 345, _steps(*timed, at=at)),
        Phase("train", 520, _steps(*_training(at, work), at=at)),
        Phase("peers", LIMIT, _steps(*_peers(at), at=at)),
    ]


def _training(at: Sizes, work: str) -> list[Step]:
    module, (_, tokens) = "benchmarks.gpu_train", at.tokens
    overrides = (*at.training, f"data.sequence_length={tokens}")
    return [
        Step(f"train/{tokens}", f"{module}:train", (work, "run", overrides, 1), 120),
        Step("train/profile", f"{module}:profile", (at.training, tokens, at.device), 60),
        Step("train/longest", f"{module}:longest", (at.training, at.tokens, at.device, 15.0), 60),
        Step("generate", f"{module}:generate", (work, "run", at.prompt, 128 if at is GPU else 4), 45),
    ]


def _peers(at: Sizes) -> list[Step]:
    first = [Shape(*at.shapes[0])]
    every = [Shape(*sizes) for sizes in at.shapes]
    wanted = [(kind, like) for kind in PEERS[:2] for like in every]
    wanted += [(kind, like) for kind in PEERS[2:] for like in first]
    return [
        Step(
            f"peer/{kind}/{at.half}/{like}",
            "benchmarks.gpu_peers:time_peer",
            (kind, at.half, like, at.device, at.repeats),
            45,
        )
        for kind, like in wanted
    ]


def tune_part(at: Sizes, out: str) -> list[Phase]:
    """Tile sizes: compile the candidates in parallel, time them, and time the mixers with the best."""
    from benchmarks.gpu_tune import kernels

    module, table = "benchmarks.gpu_tune", f"{out}/tuning.json"
    first, _, _ = [Shape(*sizes) for sizes in at.shapes]
    workload = replace(first, tokens=min(first.tokens, 32768))
    jobs = [
        (kind, kernel, like) for like in (workload, replace(workload, dim=at.small[2])) for kind, kernel in kernels()
    ]
    compiled = [
        Step(
            f"compile/{kind}/{kernel}/{like.dim}", f"{module}:compile_candidates",
            (kind, kernel, at.half, replace(like, tokens=at.compiled), at.device, at.candidates), 120,
        )
        for kind, kernel, like in jobs
    ]  # fmt: skip
    timed = [
        Step(
            f"tune/{kind}/{kernel}/{like.dim}", f"{module}:tune",
            (kind, kernel, at.half, like, at.device, at.candidates, table), 40,
        )
        for kind, kernel, like in jobs
    ]  # fmt: skip
    again = [
        Step(
            f"tuned/{kind}/{at.half}/{first}",
            f"{module}:time_tuned",
            (kind, at.half, first, at.device, at.repeats, table),
            30,
        )
        for kind in TIMED
    ]
    return [
        Phase("compile", 300, _steps(*compiled, at=at), at.workers),
        Phase("tune", 500, _steps(*timed, at=at)),
        Phase("time", LIMIT, _steps(*again, at=at)),
    ]


def nccl_part(at: Sizes, work: str, ranks: int) -> list[Phase]:
    """Every GPU of the machine: collectives, and training with the sequence split over them."""
    tokens = at.tokens[1]
    overrides = (*at.training, f"data.sequence_length={tokens}", f"parallel.cp={ranks}")
    steps = [
        Step("process-group", "benchmarks.gpu_system:process_group", (at.device,), 40),
        Step("collectives", "benchmarks.gpu_ranks:collectives", (work, ranks, at.device, at.messages), 120),
        Step("corpus", "benchmarks.gpu_train:corpus", (work, at.corpus), 90),
        Step(f"train/{tokens}/cp{ranks}", "benchmarks.gpu_train:train",
             (work, "cp", overrides, ranks), 200),
    ]  # fmt: skip
    return [Phase("nccl", LIMIT, _steps(*steps, at=at))]


def verify_part(at: Sizes) -> list[Phase]:
    """The tests that run on a GPU, all of them, and `longctx verify`."""
    keyword = "" if at is GPU else "test_arguments_that_do_not_fit"
    files = GPU_TESTS if at is GPU else GPU_TESTS[-1:]
    steps = [Step(f"pytest/{Path(file).parent.name}/{Path(file).name}", "benchmarks.gpu_system:tests",
                  (file, keyword), 510) for file in files]  # fmt: skip
    small = () if at is GPU else ("model.depth=1", "model.layers=L")
    overrides = (f"train.device={at.device}", *small)
    steps += [
        Step(f"verify/{recipe}", "benchmarks.gpu_system:verify", (recipe, overrides, 2), 300)
        for recipe in (("quickstart", "routed") if at is GPU else ("million",))
    ]
    return [Phase("verify", LIMIT, _steps(*steps, at=at), at.checkers)]


def gpus() -> list[str]:
    """Return name, driver version and memory of each GPU, as nvidia-smi has them; none without it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _commit() -> str | None:
    """Return what COMMIT says, of a copy without its history or with another; else the checkout's commit."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
        return os.environ.get("COMMIT") or done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("COMMIT")


def sources_digest() -> str:
    """Return a digest of the source files that the results depend on: it tells two trees apart without a history."""
    digest = hashlib.sha256()
    for folder in ("kernels", "longctx", "parallel", "moe", "launch", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def header(part: str, rehearsal: bool) -> dict[str, Any]:
    """Return the first line of the results: when, where, and of which code."""
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "numpy", "flash-linear-attention"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = gpus()
    name, driver = devices[0].split(", ")[:2] if devices else (None, None)
    return {
        "header": part,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "chip": name,
        "gpus": len(devices),
        "driver": driver,
        "versions": versions,
        "commit": _commit(),
        "sources": sources_digest(),
        "rehearsal": rehearsal,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part; return 0, or 1 if a step did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_mutually_exclusive_group()
    for name, text in (
        ("tune", "second part: tile sizes"), ("nccl", "third part: all GPUs"), ("verify", "third part: tests, verify")
    ):  # fmt: skip
        part.add_argument(f"--{name}", dest="part", action="store_const", const=name, default="first", help=text)
    parser.add_argument("--rehearse", action="store_true", help="every step on the CPU, at small sizes")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="only these steps, e.g. 'time/*'; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that the caller has used")
    chosen = parser.parse_args(arguments)
    if chosen.rehearse:
        # Read when Triton's kernels are defined.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Threads of several processes that share few cores wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Without processes of its own, which would outlive a step that is killed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if not chosen.rehearse and not gpus() and not Path("/dev/nvidia0").exists():
        parser.error("there is no GPU here: --rehearse runs on the CPU")
    at = REHEARSAL if chosen.rehearse else GPU
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = Results(chosen.out, chosen.part)
    for file in (results.file, results.log):
        file.unlink(missing_ok=True)
    results.began -= chosen.spent
    first = header(chosen.part, chosen.rehearse)
    results.write(first)
    print(", ".join(f"{name} {value}" for name, value in first.items() if name != "versions"), flush=True)
    with job_folder("gpu") as folder:
        work = str(folder)
        match chosen.part:
            case "tune":
                phases = tune_part(at, str(chosen.out.resolve()))
            case "nccl":
                phases = nccl_part(at, work, at.ranks if chosen.rehearse else max(1, len(gpus())))
            case "verify":
                phases = verify_part(at)
            case _:
                phases = first_part(at, work)
        failed = run([_only(phase, chosen.only, chosen.rehearse) for phase in phases], results)
    results.write({"end": chosen.part, "seconds": round(results.elapsed, 1), "failed": failed})
    print(f"{failed} steps did not end well. Results: {results.file}; output: {results.log}")
    return 1 if failed else 0


def _only(phase: Phase, patterns: Sequence[str] | None, rehearsal: bool) -> Phase:
    """Return a phase with the steps that match; a rehearsal is not limited in time."""
    wanted = tuple(s for s in phase.steps if not patterns or any(fnmatch.fnmatch(s.name, p) for p in patterns))
    return replace(phase, steps=wanted, until=float("inf") if rehearsal else phase.until)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # A process that the kernel holds, in a driver's call, would keep the interpreter from ending.
    os._exit(status)

"""GPU benchmark of the Triton kernels: correctness, tile-size tuning, timing. Run by `bash benchmarks/gpu.sh`.

    python benchmarks/gpu_kernels.py --check                         only check forward and backward against float64
    python benchmarks/gpu_kernels.py --out DIR --seconds 400         tune, save the results, and print the table

Times are medians over repeats, by CUDA events, with the L2 cache flushed before each. The percentages compare with the
memory-bandwidth bound of a row: the minimum traffic (forward: q, k, v, decay in, o out; backward: the inputs and do in,
dq, dk, dv, ddecay out) at the bandwidth that a copy of 1 GiB reached in the same run. Softmax attention has the same
bound, without a decay, although it does more work: that is the point of linear attention.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longctx.kernels.linear import tuning
from longctx.kernels.linear.additive import triton as triton_additive
from longctx.kernels.linear.api import linear_attention
from longctx.kernels.linear.delta import triton as triton_delta
from longctx.kernels.linear.recurrence import Inputs, Segment

DEVICE = torch.device("cuda")
REPEATS = 5
SOFTMAX_LONGEST = 65536
MIXERS = {
    "constant": "lightning",
    "scalar": "simple GLA",
    "vector": "GLA",
    "delta, scalar": "gated delta rule",
    "delta, vector": "KDA",
}
"""Mixer names by recurrence: the kind of decay, with the delta rule where named."""
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """One sequence of `tokens`, with `heads` of `dim`."""

    tokens: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"T {self.tokens // 1024}K  H {self.heads}  d {self.dim}"


@dataclass(frozen=True)
class Row:
    """A line of the table, times in ms."""

    shape: Shape
    what: str
    forward: float
    both: float
    forward_share: float
    both_share: float


# In order of importance: rows that do not fit into the time are dropped from the end.
SHAPES = [
    Shape(65536, 16, 128),
    Shape(8192, 64, 128),
    Shape(1048576, 8, 128),
    Shape(65536, 16, 64),
    Shape(8192, 8, 128),
    Shape(262144, 32, 128),
    Shape(1048576, 8, 64),
    Shape(8192, 64, 64),
    Shape(65536, 64, 128),
    Shape(8192, 8, 64),
]


def log_decay(decay: str, shape: Shape) -> Tensor:
    """Draw log decays, about -0.01 to -0.3, float32."""
    if decay == "constant":
        return -(2.0 ** -torch.arange(2.0, 2 + shape.heads, device=DEVICE).clamp(max=10))
    channels = (shape.dim,) if decay == "vector" else ()
    return F.logsigmoid(torch.randn(1, shape.tokens, shape.heads, *channels, device=DEVICE) + 4)


def draw(shape: Shape, recurrence: str = "", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Draw q, k, v, do; keys are unit vectors for the delta rule."""
    q, k, v, do = (torch.randn(1, shape.tokens, shape.heads, shape.dim, device=DEVICE) for _ in range(4))
    k = F.normalize(k, dim=-1) if recurrence.startswith("delta") else 0.1 * k
    return [x.to(dtype) for x in (q, k, v, do)]


def draw_gates(recurrence: str, shape: Shape) -> list[Tensor]:
    """Draw log_decay and, for the delta rule, beta, as arguments of `linear_attention`."""
    gates = [log_decay(recurrence.removeprefix("delta, "), shape)]
    if recurrence.startswith("delta"):
        gates.append(torch.rand(1, shape.tokens, shape.heads, device=DEVICE))
    return gates


def check() -> None:
    """Compare forward and backward with float64, which runs the torch operators, on packed documents."""
    failed = False
    for recurrence in MIXERS:
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            torch.manual_seed(0)
            shape = Shape(2500, 3, 48)
            q, k, v, do = draw(shape, recurrence, dtype)
            gates = draw_gates(recurrence, shape)
            results = []
            for wide in (dtype, torch.float64):
                leaves = [x.to(wide, copy=True).requires_grad_() for x in (q, k, v)]
                gate_dtype = torch.float64 if wide == torch.float64 else torch.float32
                leaves += [x.to(gate_dtype, copy=True).requires_grad_() for x in gates]
                out, _ = linear_attention(*leaves, cu_seqlens=(0, 700, 1500, 2500))
                out.backward(do.to(wide))
                results.append((out, *(x.grad for x in leaves)))
            names = ("o", "dq", "dk", "dv", "dg", "db")
            for name, got, want in zip(names, *results, strict=False):
                error = ((got.double() - want).norm() / want.norm()).item()
                # The gradient of a constant decay is a small sum of large terms with both signs.
                constant = recurrence == "constant" and name == "dg"
                close = error < bound * (100 if constant else 5 if name in ("dg", "db") else 1)
                failed = failed or not close
                print(f"{recurrence:13} {dtype!s:15} {name:3} {error:.1e}{'' if close else '  OUT OF BOUNDS'}")
    if failed:
        raise SystemExit("the kernels differ from float64")


def milliseconds(run: Callable[[], object], flush: Tensor) -> float:
    """Measure the median milliseconds of a call, after two warm-up calls."""
    run()
    run()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(flush: Tensor) -> float:
    """Measure the bytes per second, reads plus writes, of a copy."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), flush) * 1000


def tuning_workload(name: str, decay: str, dim: int) -> Callable[[], object]:
    """Return a call dominated by one kernel of tuning.ADDITIVE_KERNELS or tuning.DELTA_KERNELS."""
    shape = Shape(32768, 16, dim)
    recurrence = f"delta, {decay}" if name in tuning.DELTA_KERNELS else decay
    q, k, v, do = draw(shape, recurrence)
    kernels = triton_delta if name in tuning.DELTA_KERNELS else triton_additive
    gates = tuple(reversed(draw_gates(recurrence, shape)))
    segments = Segment(0, shape.tokens).cut(kernels.segment_length(shape.heads, shape.tokens, DEVICE))
    if name == "summary":
        return lambda: kernels.summarize(Inputs(None, k, v, gates), segments)
    if name == "delta_backward":
        return lambda: kernels.summarize_grad(Inputs(q, k, v, gates), segments, do)
    states = kernels.summarize(Inputs(None, k, v, gates), segments).state
    if name in ("apply", "delta_prepare", "delta_forward"):
        return lambda: kernels.apply(Inputs(q, k, v, gates), segments, states)
    gate_grads = decay != "constant"
    return lambda: kernels.apply_grad(Inputs(q, k, v, gates), segments, do, states, states, gate_grads)


def before(deadline: float) -> Callable[[object], bool]:
    """Return a predicate that holds until the deadline."""
    return lambda _: time.monotonic() < deadline


def print_failure(sizes: tuning.TileSizes, error: Exception) -> None:
    """Print which tile sizes failed, and why."""
    said = str(error).strip().splitlines() or [""]
    print(f"  failed {sizes}: {type(error).__name__}: {said[0][:200]}", flush=True)


def tune(seconds: float, path: Path) -> None:
    """Tune tile sizes in bf16, with a share of the time per kernel, and save them in `path` after each.

    Sizes near the defaults are tried first.
    """
    finish = time.monotonic() + seconds
    jobs = [(name, decay, dim) for dim in (128, 64) for decay in tuning.DECAY_KINDS for name in tuning.ADDITIVE_KERNELS]
    deltas = [(name, decay, 128) for decay in ("scalar", "vector") for name in tuning.DELTA_KERNELS]
    jobs[len(jobs) // 2 : len(jobs) // 2] = deltas
    while jobs:
        (name, decay, dim), *jobs = jobs
        together = tuning.choose_tiles(f"dk_dv/{decay}", dim, dim, torch.bfloat16, DEVICE)
        fused = together["block_k"] >= dim and together["block_v"] >= dim
        if name in (("dk", "dv") if fused else ("dk_dv",)):
            continue
        deadline = time.monotonic() + (finish - time.monotonic()) / (len(jobs) + 1)
        kernel = f"{name}/{decay}"
        attempts = takewhile(before(deadline), tuning.candidates(kernel, dim, dim, torch.bfloat16, DEVICE))
        run = tuning_workload(name, decay, dim)
        best = tuning.tune(kernel, dim, dim, torch.bfloat16, DEVICE, run, attempts, print_failure)
        tuning.save(path)
        print(f"tuned {kernel:21} {dim:4}  {best}", flush=True)


def min_bytes(shape: Shape, recurrence: str | None) -> tuple[int, int]:
    """Compute the minimum memory traffic in bytes: forward, and forward and backward."""
    tensor, numbers = 2 * shape.tokens * shape.heads * shape.dim, 4 * shape.tokens * shape.heads
    delta, decay = (recurrence or "").startswith("delta"), (recurrence or "").removeprefix("delta, ")
    gate = {"scalar": numbers, "vector": 2 * tensor}.get(decay, 0) + numbers * delta
    return 4 * tensor + gate, 11 * tensor + 3 * gate


def ours(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
    """Run the kernels of this library."""
    return linear_attention(q, k, v, *gates)[0]


def peer(recurrence: str) -> tuple[str, Run] | None:
    """Return fla's kernel for the same recurrence; None if fla is not installed."""
    try:
        if recurrence == "constant":
            lightning = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn
            return "fla chunk_lightning_attn", lambda q, k, v, g: lightning(q, k, v, layer_idx=0, num_layers=12)[0]
        if recurrence == "delta, scalar":
            gated = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
            return "fla chunk_gated_delta_rule", lambda q, k, v, g, b: gated(q, k, v, g=g, beta=b, scale=1.0)[0]
        if recurrence == "delta, vector":
            kda = importlib.import_module("fla.ops.kda").chunk_kda
            return "fla chunk_kda", lambda q, k, v, g, b: kda(q, k, v, g=g, beta=b, scale=1.0)[0]
        if recurrence == "scalar":
            simple = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
            return "fla chunk_simple_gla", lambda q, k, v, g: simple(q, k, v, g=g, scale=1.0)[0]
        gla = importlib.import_module("fla.ops.gla").chunk_gla
        return "fla chunk_gla", lambda q, k, v, g: gla(q, k, v, g=g, scale=1.0)[0]
    except ImportError:
        return None


def softmax(backend: SDPBackend) -> Run:
    """Return torch's causal attention, which has heads before tokens; the transposed views cost nothing."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def entries() -> Iterator[tuple[Shape, str | None, str, Run]]:
    """Iterate over the rows to measure, in order of importance."""
    for shape in SHAPES:
        for recurrence, mixer in MIXERS.items():
            yield shape, recurrence, f"longctx {mixer}", ours
            other = peer(recurrence)
            if other is not None:
                yield shape, recurrence, *other
        if shape.tokens <= SOFTMAX_LONGEST:
            yield shape, None, "torch softmax, flash", softmax(SDPBackend.FLASH_ATTENTION)
            yield shape, None, "torch softmax, cuDNN", softmax(SDPBackend.CUDNN_ATTENTION)


def measure(shape: Shape, recurrence: str | None, what: str, run: Run, bandwidth: float, flush: Tensor) -> Row:
    """Measure forward, and forward and backward. As in the models, a constant decay has no gradient."""
    q, k, v, do = draw(shape, recurrence or "")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    if recurrence is not None:
        inputs += [gate.requires_grad_(recurrence != "constant") for gate in draw_gates(recurrence, shape)]

    def forward() -> None:
        with torch.no_grad():
            run(*inputs)

    def both() -> None:
        out = run(*inputs)
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], do)

    times = milliseconds(forward, flush), milliseconds(both, flush)
    bounds = [size / bandwidth * 1000 for size in min_bytes(shape, recurrence)]
    return Row(shape, what, *times, bounds[0] / times[0], bounds[1] / times[1])


def table(finish: float, bandwidth: float, flush: Tensor) -> tuple[list[Row], list[str]]:
    """Measure as many rows as the time allows; return them, and the dropped ones with reasons."""
    rows, dropped = [], []
    for shape, recurrence, what, run in entries():
        name = f"{shape}  {what}"
        if time.monotonic() > finish:
            dropped.append(f"{name}: no time left")
            continue
        try:
            rows.append(measure(shape, recurrence, what, run, bandwidth, flush))
        except Exception as error:  # noqa: BLE001 - a failing peer is reported and does not end the run
            dropped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")
        torch.cuda.empty_cache()
    return rows, dropped


def main() -> None:
    """Tune, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=400)
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    tune(0.45 * arguments.seconds, arguments.out / "tuning.json")
    bandwidth = copy_bandwidth(flush)
    # The last row may start just before this time, and its kernels take seconds to compile.
    rows, dropped = table(began + 0.93 * arguments.seconds, bandwidth, flush)
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_bytes_per_second": bandwidth,
        "rows": [asdict(row) for row in rows],
        "dropped": dropped,
    }
    (arguments.out / "table.json").write_text(json.dumps(report, indent=1) + "\n")
    for line in dropped:
        print(f"skipped: {line}")
    print(f"\n{report['device']}, torch {torch.__version__}, bf16; a copy reaches {bandwidth / 1e12:.2f} TB/s")
    print(f"{'':22} {'':26} {'forward':>20} {'forward + backward':>20}")
    for row in rows:
        times = f"{row.forward:9.2f} ms {row.forward_share:7.0%} {row.both:9.2f} ms {row.both_share:7.0%}"
        print(f"{row.shape!s:22} {row.what:26} {times}")


if __name__ == "__main__":
    main()

"""Training steps of the GPU benchmark: `longctx train`, a profiled step, the longest sequence, `longctx generate`.

The model is benchmarks/gpu-1b.toml. Utilisation is model FLOPs per second (forward and twice as many backward, without
recomputation) over the matmul rate that was measured in the same process.
"""

import json
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu_runner import Skip
from benchmarks.gpu_system import longctx, own_environment
from longctx.bench.isolated import report
from longctx.engines.metrics import FILE_NAME

RECIPE = str(Path(__file__).with_name("gpu-1b.toml"))
BYTES = 257
"""Vocabulary of the byte tokenizer."""
FILLED = 0.92
"""Fraction of the GPU's memory that a step may be expected to take."""
GRAIN = 16384
"""The longest sequence is a multiple of this many tokens."""


def corpus(work: str, folder: str) -> dict[str, Any]:
    """Prepare a corpus of one long document from a folder of Python's standard library ("" for all of it)."""
    source = Path(sysconfig.get_paths()["stdlib"]) / folder
    excluded = ("site-packages", "test", "encodings", "pydoc_data")
    options = [part for name in excluded for part in ("--exclude", name)]
    longctx(
        "data", "prepare", str(source), "--suffix", ".py", *options, "--on-error", "skip", "--join", "folder",
        "--no-progress", "--out", f"{work}/corpus",
    )  # fmt: skip
    return {}


def train(work: str, run: str, overrides: Sequence[str], ranks: int) -> dict[str, Any]:
    """Run `longctx train`, from the recipe to the checkpoint; report its metrics step by step."""
    if not Path(work, "corpus").exists():
        raise Skip("the corpus is missing")
    out = Path(work, run)
    arguments = [sys.executable, "-m", "longctx", "train", RECIPE, f"data.path={work}/corpus", *overrides]
    arguments += ["--nproc", str(ranks), "--resume", "never", "--out", str(out)]
    print("+", *arguments, flush=True)
    process = subprocess.Popen(arguments, stdout=None, stderr=subprocess.STDOUT)
    while process.poll() is None:
        report(_metrics(out / FILE_NAME))
        time.sleep(0.2)
    report(_metrics(out / FILE_NAME))
    if process.returncode:
        raise RuntimeError(f"longctx train ended with status {process.returncode}: see the log")
    checkpoints = list((out / "checkpoints").glob("step-*"))
    assert checkpoints, "no checkpoint was saved"
    return {}


def _metrics(path: Path) -> dict[str, Any]:
    """Return the constants of a run, and its last step so far, which is the least disturbed by compilation."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    rows = [json.loads(line) for line in lines]
    result: dict[str, Any] = {}
    for row in rows:
        if row["kind"] == "run":
            result |= {name: row[name] for name in ("parameters", "flops_per_token", "matmul_rate", "attention")}
        elif row["kind"] == "step":
            names = ("step", "loss", "grad_norm", "tokens_per_second", "utilisation")
            result |= {f"step_{name}" if name == "step" else name: row[name] for name in names}
            result |= {"step_seconds": row["seconds"], "memory_gib": row["memory_bytes"] / 2**30}
    result["losses"] = [row["loss"] for row in rows if row["kind"] == "step"]
    return result


class _Engine:
    """The recipe's engine on one rank, and steps on one document of random tokens."""

    def __init__(self, overrides: Sequence[str], device: str) -> None:
        import torch

        from longctx.recipe import load
        from longctx.system import matmul_rate
        from longctx.train.build_engine import build_engine

        self.recipe = load(RECIPE, overrides)
        self.vocabulary = self.recipe.model.vocabulary_rows(BYTES)
        self.engine = build_engine(self.recipe, device, self.vocabulary)
        self.mesh, self.device = self.engine.mesh, self.engine.device
        dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        self.matmul_rate = matmul_rate(self.device, dtype)

    def batch(self, tokens: int) -> Any:
        """Return a batch of one document."""
        import torch

        from longctx.engines.base import Batch
        from longctx.parallel.layout import Layout

        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, BYTES, (1, tokens), generator=generator).to(self.device)
        return Batch(x, torch.roll(x, -1, dims=1), Layout.on(self.mesh, [0, tokens], self.recipe.parallel.layout))

    def step(self, batch: Any) -> None:
        """Take one optimizer step, to its end."""
        from benchmarks.gpu_timing import synchronize

        self.engine.step([batch], 1e-4)
        synchronize(self.device)

    def measure(self, batch: Any) -> dict[str, Any]:
        """Time a step; its peak memory and utilisation."""
        from benchmarks.gpu_timing import peak_mib

        began = time.perf_counter()
        peak = peak_mib(lambda: self.step(batch), self.device)
        seconds = time.perf_counter() - began
        flops = 3 * self.engine.flops(batch.layout)
        tokens = batch.tokens.shape[1]
        return {
            "tokens": tokens,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "utilisation": flops / seconds / self.matmul_rate,
            "memory_gib": peak / 1024,
        }


@contextmanager
def _engine(overrides: Sequence[str], device: str) -> Iterator[_Engine]:
    from longctx.train.process_group import process_group

    with own_environment(), process_group(device, 60):
        yield _Engine(overrides, device)


def profile(overrides: Sequence[str], tokens: int, device: str) -> dict[str, Any]:
    """Profile one step at a length, after a timed step: the time of all kernels, and the 20 longest; host waits."""
    from benchmarks.gpu_timing import host_waits, kernels_of

    with _engine(overrides, device) as engine:
        batch = engine.batch(tokens)
        engine.step(batch)
        report(engine.measure(batch))
        kernels = kernels_of(lambda: engine.step(batch), engine.device)
        report({"kernels_ms": sum(row["ms"] for row in kernels), "kernels": kernels[:20]})
        report({"host_waits": host_waits(lambda: engine.step(batch), engine.device)})
    return {}


def longest_length(
    short: dict[str, Any], long: dict[str, Any], flops_ratio: float, total_gib: float, most_seconds: float
) -> tuple[int, str]:
    """Return the longest sequence that is expected to fit, and what limits it, "memory" or "time".

    From two measured steps: memory grows linearly with the length, and time with the FLOPs. `flops_ratio` is what a
    token of length adds to the FLOPs of each token, as a fraction of those at `long`.
    """
    gib = (long["memory_gib"] - short["memory_gib"]) / (long["tokens"] - short["tokens"])
    left = FILLED * total_gib - long["memory_gib"]
    by_memory = long["tokens"] + int(left / max(gib, 1e-12))
    by_time = long["tokens"]
    while by_time < by_memory:
        longer = by_time + GRAIN
        growth = longer / long["tokens"] * (1 + flops_ratio * (longer - long["tokens"]))
        if long["step_seconds"] * growth > most_seconds:
            break
        by_time = longer
    length = max(GRAIN, min(by_memory, by_time) // GRAIN * GRAIN)
    return length, "memory" if by_memory <= by_time else "time"


def longest(overrides: Sequence[str], lengths: tuple[int, int], device: str, most_seconds: float) -> dict[str, Any]:
    """Take a step on the longest sequence that fits into the GPU's memory, and into `most_seconds`.

    The length is extrapolated from steps at two lengths, and shortened where memory runs out. On a CPU it is twice the
    longer one.
    """
    import torch

    rows = []
    with _engine(overrides, device) as engine:
        for tokens in lengths:
            batch = engine.batch(tokens)
            engine.step(batch)
            rows.append(engine.measure(batch))
            report({"measured": rows})
        short, long = rows
        if device == "cuda":
            per_token = [row["flops_per_second"] * row["step_seconds"] / row["tokens"] for row in rows]
            ratio = (1 - per_token[0] / per_token[1]) / (long["tokens"] - short["tokens"])
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            tokens, limit = longest_length(short, long, ratio, total, most_seconds)
        else:
            tokens, limit = 2 * long["tokens"], "rehearsal"
    report({"limited_by": limit})
    while tokens > long["tokens"]:
        report({"limited_by": limit, "tried": tokens})
        # A new engine each time: one that ran out of memory is in the middle of its step.
        with _engine(overrides, device) as engine:
            try:
                return engine.measure(engine.batch(tokens))
            except torch.OutOfMemoryError:
                limit = "memory"
        torch.cuda.empty_cache()
        tokens = int(0.85 * tokens) // GRAIN * GRAIN
    return long


def generate(work: str, run: str, prompt: int, tokens: int) -> dict[str, Any]:
    """Run `longctx generate` from the checkpoint of a run, after a prompt of `prompt` bytes."""
    if not list(Path(work, run, "checkpoints").glob("step-*")):
        raise Skip(f"{run} has no checkpoint")
    text = Path(__file__).read_text(encoding="ascii")
    file = Path(work, "prompt.txt")
    file.write_text((text * (prompt // len(text) + 1))[:prompt], encoding="ascii")
    output = longctx("generate", f"{work}/{run}", "--prompt-file", str(file), "--tokens", str(tokens))
    found = re.search(r"([\d,]+) tokens \(([\d.]+) s to first token(?:, then ([\d,]+) tokens/s)?", output)
    assert found is not None, "no timing in the output"
    numbers = [None if part is None else float(part.replace(",", "")) for part in found.groups()]
    return {
        "prompt": prompt,
        "generated": numbers[0],
        "first_token_seconds": numbers[1],
        "tokens_per_second": numbers[2],
    }

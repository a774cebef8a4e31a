"""Tuning steps of the GPU benchmark: tile sizes of the Triton kernels, compiled in parallel, then timed one by one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kernels import time_recurrence
from benchmarks.gpu_recurrences import INTERPRETED_SEGMENT, draw, triton_module
from benchmarks.gpu_runner import Skip
from benchmarks.gpu_shape import Shape
from benchmarks.gpu_timing import synchronize
from longctx.bench.isolated import report
from longctx.kernels.linear import tuning
from longctx.kernels.linear.recurrence import Inputs, Segment


def kernels() -> list[tuple[str, str]]:
    """Return the kernels to tune, (kind of recurrence, kernel)."""
    additive = [(f"additive/{decay}", name) for decay in ("constant", "scalar") for name in tuning.ADDITIVE_KERNELS]
    vector = [("additive/vector", name) for name in tuning.VECTOR_KERNELS]
    delta = [(f"delta/{decay}", name) for decay in ("scalar", "vector") for name in tuning.DELTA_KERNELS]
    # The gradients of pairs are a kernel of their own for scalar decays only.
    return [*additive, *vector, *(pair for pair in delta if pair != ("delta/vector", "delta_pairs"))]


def _workload(kind: str, kernel: str, dtype: torch.dtype, shape: Shape, device: torch.device) -> Callable[[], object]:
    """Return a call of the pass that a kernel belongs to."""
    drawn, passes = draw(kind, shape, dtype, device), triton_module(kind)
    inputs = Inputs(drawn.q, drawn.k, drawn.v, drawn.gates)
    length = INTERPRETED_SEGMENT
    if device.type == "cuda":
        length = passes.segment_length(shape.heads, shape.tokens, device)
    segments = Segment(0, shape.tokens).cut(length)
    if kernel == "summary":
        return lambda: passes.summarize(inputs, segments)
    if kernel == "delta_backward":
        return lambda: passes.summarize_grad(inputs, segments, drawn.do)
    states = torch.zeros(len(segments), *inputs.state_shape, device=device)
    if kernel in ("apply", "prepare", "delta_prepare", "delta_forward"):
        return lambda: passes.apply(inputs, segments, states)
    gate_grads = not kind.endswith("constant")
    return lambda: passes.apply_grad(inputs, segments, drawn.do, states, states, gate_grads)


def _is_launched(kind: str, kernel: str, dtype: torch.dtype, dim: int, device: torch.device) -> bool:
    """Return whether the kernel runs at this size: dk and dv together or in a sweep each."""
    if kind == "additive/vector":
        return True
    sizes = tuning.choose_tiles(f"dk_dv/{kind.split('/')[1]}", dim, dim, dtype, device)
    together = sizes["block_k"] >= dim and sizes["block_v"] >= dim
    return kernel not in (("dk", "dv") if together else ("dk_dv",))


def _candidates(
    kind: str, kernel: str, dtype: torch.dtype, dim: int, device: torch.device, most: int
) -> list[tuning.TileSizes]:
    if kind.startswith("additive") and not _is_launched(kind, kernel, dtype, dim, device):
        raise Skip("not launched at this size")
    name = f"{kernel}/{kind.split('/')[1]}"
    return tuning.candidates(name, dim, dim, dtype, device)[:most]


def compile_candidates(kind: str, kernel: str, dtype: str, shape: Shape, device: str, most: int) -> dict[str, Any]:
    """Compile a kernel in up to `most` sizes, the nearest to the default first; count those that do not."""
    place = torch.device(device)
    run = _workload(kind, kernel, getattr(torch, dtype), shape, place)
    refused = {}
    compiled = 0
    for sizes in _candidates(kind, kernel, getattr(torch, dtype), shape.dim, place, most):
        try:
            with tuning.override_tiles(f"{kernel}/{kind.split('/')[1]}", sizes):
                run()
            synchronize(place)
            compiled += 1
        except Exception as error:
            refused[json.dumps(sizes)] = f"{type(error).__name__}: {str(error)[:100]}"
            if "CUDA error" in str(error):
                raise
        report({"compiled": compiled, "refused": refused})
    return {}


def tune(kind: str, kernel: str, dtype: str, shape: Shape, device: str, most: int, file: str) -> dict[str, Any]:
    """Time a kernel in up to `most` sizes and put the fastest into the table `file`; the table stays whole."""
    place, name = torch.device(device), f"{kernel}/{kind.split('/')[1]}"
    attempts = _candidates(kind, kernel, getattr(torch, dtype), shape.dim, place, most)
    run = _workload(kind, kernel, getattr(torch, dtype), shape, place)
    if device == "cpu":  # tuning times on CUDA
        with tuning.override_tiles(name, attempts[0]):
            run()
        return {"best": attempts[0], "default": attempts[0], "candidates": len(attempts)}
    refused = {}

    def refuse(sizes: tuning.TileSizes, error: Exception) -> None:
        refused[json.dumps(sizes)] = f"{type(error).__name__}: {str(error)[:100]}"
        report({"refused": refused})

    best = tuning.tune(name, shape.dim, shape.dim, getattr(torch, dtype), place, run, attempts, refuse)
    path, draft = Path(file), Path(f"{file}.draft")
    tuning.save(draft)
    found = json.loads(draft.read_text())
    table = json.loads(path.read_text()) if path.exists() else {}
    draft.write_text(json.dumps(table | found, indent=1, sort_keys=True) + "\n")
    draft.replace(path)
    return {"best": best, "default": attempts[0], "candidates": len(attempts)}


def time_tuned(kind: str, dtype: str, shape: Shape, device: str, repeats: int, file: str) -> dict[str, Any]:
    """Time a recurrence with the sizes in `file`, as in the first part."""
    if not Path(file).exists():
        if device == "cuda":
            raise Skip("no kernel was tuned")
        Path(file).write_text("{}\n")
    os.environ["LONGCTX_TUNING"] = file
    return time_recurrence(kind, dtype, shape, device, repeats)

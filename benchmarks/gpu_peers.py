"""Peer steps of the GPU benchmark: fla's kernels on the same inputs, compared with ours and timed.

fla tunes each kernel over tens of configurations, minutes in all: here over CONFIGURATIONS of them, those nearest to
blocks of 64, 4 warps and 3 stages. On a CPU, where fla does not run, our torch operators stand for it.
"""

import importlib
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kernels import timings
from benchmarks.gpu_recurrences import Inputs, attend, draw, with_gradients
from benchmarks.gpu_runner import Skip
from benchmarks.gpu_shape import Shape
from benchmarks.gpu_timing import relative
from longctx.bench.isolated import report

CONFIGURATIONS = 2
"""Per kernel, of fla's."""
REFUSAL = "produces incorrect results"
"""In the error by which fla refuses a backward pass that this Triton compiles wrongly: forward alone is timed then."""
BOUND = 3e-2
"""Relative difference in bf16 up to which both compute the same; gradients of gates five times that."""
_FLA = {
    "additive/constant": ("simple_gla", "chunk_simple_gla"),
    "additive/scalar": ("simple_gla", "chunk_simple_gla"),
    "additive/vector": ("gla", "chunk_gla"),
    "delta/none": ("delta_rule", "chunk_delta_rule"),
    "delta/scalar": ("gated_delta_rule", "chunk_gated_delta_rule"),
    "delta/vector": ("kda", "chunk_kda"),
}


def distance(sizes: dict[str, Any], warps: int, stages: int) -> float:
    """Return how far a configuration is from blocks of 64, 4 warps and 3 stages."""
    blocks = [value for name, value in sizes.items() if name.startswith("B") and isinstance(value, int) and value > 0]
    return sum(abs(math.log2(block / 64)) for block in blocks) + abs(math.log2(warps / 4)) + abs(stages - 3) / 2


@cache
def restrict_autotuner(count: int) -> None:
    """Make Triton's autotuner try at most `count` configurations of each kernel, in this process."""
    from triton.runtime.autotuner import Autotuner

    pruned = Autotuner.prune_configs

    def prune(tuner: Any, arguments: dict[str, Any]) -> list[Any]:
        found = list(pruned(tuner, arguments))
        return sorted(found, key=lambda x: distance(x.kwargs, x.num_warps, x.num_stages or 3))[:count]

    Autotuner.prune_configs = prune


def fla(kind: str) -> Callable[[Inputs], Tensor]:
    """Return fla's function for a recurrence, as a function of our inputs. Raises Skip without fla."""
    module, function = _FLA[kind]
    try:
        call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    except ImportError as error:
        raise Skip(f"fla cannot be imported: {error}") from None

    def run(inputs: Inputs) -> Tensor:
        gates = list(inputs.gates)
        named = {"beta": gates.pop(0)} if kind.startswith("delta") else {}
        if gates:
            named["g_gamma" if kind.endswith("constant") else "g"] = gates[0]
        out: Tensor = call(inputs.q, inputs.k, inputs.v, scale=1.0, **named)[0]
        return out

    return run


def _stand_in(inputs: Inputs) -> Tensor:
    wide = replace(inputs.double(), do=inputs.do)
    return attend(wide).to(inputs.v.dtype)


def _leaves(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    """Return inputs that need gradients, and those tensors; as in the models, a constant decay has none."""
    q, k, v, *gates = (x.detach() for x in (inputs.q, inputs.k, inputs.v, *inputs.gates))
    leaves = [x.requires_grad_() for x in (q, k, v, *(gate for gate in gates if gate.dim() > 1))]
    return replace(inputs, q=q, k=k, v=v, gates=tuple(gates)), leaves


def time_peer(kind: str, dtype: str, shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """Compare fla's results with ours, then time them as ours are timed."""
    place = torch.device(device)
    if device == "cuda":
        restrict_autotuner(CONFIGURATIONS)
        run = fla(kind)
        report({"fla": importlib.metadata.version("flash-linear-attention"), "configurations": CONFIGURATIONS})
    else:
        run = _stand_in
    inputs = draw(kind, shape, getattr(torch, dtype), place)

    def forward() -> None:
        with torch.no_grad():
            run(inputs)

    def both() -> Sequence[Tensor]:
        given, leaves = _leaves(inputs)
        out = run(given)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.do)

    ours = with_gradients(inputs, constant=False)
    try:
        theirs = both()
    except RuntimeError as error:
        if REFUSAL not in str(error):
            raise
        report({"backward": str(error)})
        with torch.no_grad():
            theirs = (run(inputs),)
    result = compare(inputs.names, ours, theirs)
    report({"differences": result["differences"]})
    timings(forward, both if len(theirs) > 1 else None, place, repeats)
    return result


def compile_peer(kind: str, dtype: str, shape: Shape, device: str) -> dict[str, Any]:
    """Compile fla's kernels by running them on a short sequence."""
    if device != "cuda":
        raise Skip("fla runs on a GPU alone")
    return time_peer(kind, dtype, shape, device, 1)


def compare(names: Sequence[str], ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, Any]:
    """Return the relative differences of a peer's results from ours, and whether they are out of bounds."""
    found = dict(zip(names, map(relative, theirs, ours), strict=False))
    bounds = {name: BOUND * (5 if name in ("dbeta", "dlog_decay") else 1) for name in found}
    wrong = [f"{name} {found[name]:.1e}" for name in found if not found[name] <= bounds[name]]
    return {"differences": found, **({"wrong": True, "error": "; ".join(wrong)} if wrong else {})}

"""Kernel measurement, in the current process: time and memory of a kernel or its peer, forward or with backward."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.bench.kernels import KERNELS, Shape, Workload
from longctx.bench.peers import PEERS
from longctx.bench.timing import Clock, memory_taken, repeat

WARM_UP = 512
"""Tokens of the warm-up call, which triggers lazy loading and compilation."""


@dataclass(frozen=True)
class KernelTask:
    """A kernel or peer to measure, with its inputs and the number of repeats."""

    kernel: str
    peer: bool
    backward: bool
    shape: Shape
    device: str
    """"cpu" or "cuda"."""
    repeats: int
    seconds: float
    """Time limit of the repeats; see `longctx.bench.timing.repeat`."""


@dataclass(frozen=True)
class Measurement:
    """Time and memory of a task."""

    seconds: float
    """The median of `times`."""
    times: list[float]
    input_bytes: int
    """Bytes of the inputs, and for the backward pass of the output gradient: allocated before memory is measured."""
    memory: int | None
    """Peak bytes beyond the inputs, including results: `longctx.bench.timing.memory_taken`."""
    moved: int
    """Minimum bytes read or written: inputs and output in the forward pass; inputs, output gradient and input gradients
    in the backward pass."""


def build_workload(task: KernelTask, shape: Shape) -> Workload:
    """Build the kernel's or its peer's workload on random inputs of `shape`, the same for both."""
    kernel = KERNELS[task.kernel]
    inputs = kernel.draw(shape, torch.Generator(task.device).manual_seed(0))
    workload = PEERS[task.kernel, task.device].build(inputs) if task.peer else kernel.workload(inputs)
    for name, leaf in workload.leaves.items():
        leaf.requires_grad_(task.backward and name not in workload.constants)
    return workload


def run(workload: Workload, do: Tensor | None) -> Tensor:
    """Run forward, and backward if there is an output gradient `do`; accumulates into the leaves' gradients."""
    if do is None:
        with torch.no_grad():
            return workload.run(workload.leaves)
    out = workload.run(workload.leaves)
    out.backward(do)
    return out.detach()


def _output_gradient(task: KernelTask, shape: Shape) -> tuple[Tensor | None, int]:
    """Warm up on a short sequence; return a random output gradient (None without backward) and the output's bytes."""
    short = replace(shape, tokens=min(shape.tokens, WARM_UP))
    workload = build_workload(task, short)
    out = run(workload, None)
    if task.backward:
        run(workload, torch.zeros_like(out))
    size = (1, shape.tokens, *out.shape[2:])
    nbytes = torch.Size(size).numel() * out.element_size()
    generator = torch.Generator(task.device).manual_seed(1)
    do = torch.randn(size, generator=generator, device=task.device, dtype=out.dtype) if task.backward else None
    return do, nbytes


def measure(task: KernelTask) -> Measurement:
    """Measure a task in this process, which should be a fresh one: `longctx.bench.isolated`."""
    device = torch.device(task.device)
    do, output_bytes = _output_gradient(task, task.shape)
    workload = build_workload(task, task.shape)
    clock = Clock(device)

    def sample() -> float:
        for leaf in workload.leaves.values():
            leaf.grad = None
        return clock.seconds(lambda: run(workload, do))

    first: list[float] = []
    memory = memory_taken(lambda: first.append(sample()), device)
    times = repeat(sample, first[0], repeats=task.repeats, seconds=task.seconds)
    leaves = sum(leaf.nbytes for leaf in workload.leaves.values())
    moved = leaves + output_bytes
    if task.backward:
        grads = sum(leaf.nbytes for leaf in workload.leaves.values() if leaf.requires_grad)
        moved += leaves + output_bytes + grads
    return Measurement(
        seconds=statistics.median(times),
        times=times,
        input_bytes=leaves + (0 if do is None else do.nbytes),
        memory=memory,
        moved=moved,
    )


def measure_lengths(task: KernelTask, lengths: Sequence[int]) -> list[Measurement]:
    """Measure a task at several sequence lengths."""
    return [measure(replace(task, shape=replace(task.shape, tokens=length))) for length in lengths]


def compare_to_peer(task: KernelTask) -> dict[str, float]:
    """Compute the relative differences `|peer - ours| / |ours|` of output and gradients on the same inputs, by name."""
    results = []
    for peer in (False, True):
        one = replace(task, peer=peer, backward=True)
        workload = build_workload(one, task.shape)
        generator = torch.Generator(task.device).manual_seed(1)
        out = run(workload, None)
        do = torch.randn(out.shape, generator=generator, device=task.device).to(out.dtype)
        run(workload, do)
        grads = workload.gradients({name: leaf.grad for name, leaf in workload.leaves.items() if leaf.grad is not None})
        results.append({"o": out, **{f"d{name}": grad for name, grad in grads.items()}})
    ours, theirs = results
    return {name: relative(theirs[name], ours[name]) for name in ours if name in theirs}


def relative(x: Tensor, ref: Tensor) -> float:
    """Compute `|x - ref| / |ref|` (norms) in float64."""
    return float((x.double() - ref.double()).norm() / ref.double().norm())

"""One measurement, in the process that it is made in: a kernel or its peer, forward or forward and backward."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longctx.bench.kernels import KERNELS, Shape, Subject
from longctx.bench.peers import PEERS
from longctx.bench.timing import Clock, memory_taken, repeat

WARM_UP = 512
"""Tokens of the call before all others, which loads what a first call loads."""


@dataclass(frozen=True)
class Task:
    """What to measure, and how often."""

    kernel: str
    peer: bool
    backward: bool
    shape: Shape
    device: str
    """"cpu" or "cuda"."""
    repeats: int
    seconds: float
    """How long repeating may take; see `longctx.bench.timing.repeat`."""


@dataclass(frozen=True)
class Measured:
    """What a task took."""

    seconds: float
    """The median of `times`."""
    times: list[float]
    input_bytes: int
    """What is read, and for the backward pass the gradient of the output: there before memory is measured."""
    memory: int | None
    """Bytes at the peak beyond the inputs, results included: `longctx.bench.timing.memory_taken`."""
    moved: int
    """Bytes that have to be read or written: by the forward pass the inputs and the output, by the backward pass the
    inputs, the gradient of the output and those of the inputs."""


def subject(task: Task, shape: Shape) -> Subject:
    """The kernel or its peer on inputs of a shape, the same for both."""
    kernel = KERNELS[task.kernel]
    inputs = kernel.draw(shape, torch.Generator(task.device).manual_seed(0))
    made = PEERS[task.kernel, task.device].build(inputs) if task.peer else kernel.subject(inputs)
    for name, leaf in made.leaves.items():
        leaf.requires_grad_(task.backward and name not in made.constants)
    return made


def run(made: Subject, do: Tensor | None) -> Tensor:
    """Forward, and backward where there is a gradient `do` of the output; adds to the leaves' gradients."""
    if do is None:
        with torch.no_grad():
            return made.run(made.leaves)
    out = made.run(made.leaves)
    out.backward(do)
    return out.detach()


def _output_gradient(task: Task, shape: Shape) -> tuple[Tensor | None, int]:
    """A gradient of the output, where it is wanted, and the bytes of the output; warms up on the way."""
    short = replace(shape, tokens=min(shape.tokens, WARM_UP))
    made = subject(task, short)
    out = run(made, None)
    if task.backward:
        run(made, torch.zeros_like(out))
    size = (1, shape.tokens, *out.shape[2:])
    nbytes = torch.Size(size).numel() * out.element_size()
    generator = torch.Generator(task.device).manual_seed(1)
    do = torch.randn(size, generator=generator, device=task.device, dtype=out.dtype) if task.backward else None
    return do, nbytes


def measure(task: Task) -> Measured:
    """Measure in this process, which should be one of its own: `longctx.bench.alone`."""
    device = torch.device(task.device)
    do, output_bytes = _output_gradient(task, task.shape)
    made = subject(task, task.shape)
    clock = Clock(device)

    def sample() -> float:
        for leaf in made.leaves.values():
            leaf.grad = None
        return clock.seconds(lambda: run(made, do))

    first: list[float] = []
    memory = memory_taken(lambda: first.append(sample()), device)
    times = repeat(sample, first[0], repeats=task.repeats, seconds=task.seconds)
    leaves = sum(leaf.nbytes for leaf in made.leaves.values())
    moved = leaves + output_bytes
    if task.backward:
        grads = sum(leaf.nbytes for leaf in made.leaves.values() if leaf.requires_grad)
        moved += leaves + output_bytes + grads
    return Measured(
        seconds=statistics.median(times),
        times=times,
        input_bytes=leaves + (0 if do is None else do.nbytes),
        memory=memory,
        moved=moved,
    )


def measure_lengths(task: Task, lengths: Sequence[int]) -> list[Measured]:
    """The task at several lengths."""
    return [measure(replace(task, shape=replace(task.shape, tokens=length))) for length in lengths]


def differences(task: Task) -> dict[str, float]:
    """How far the peer is from the kernel on the same inputs: `|peer - ours| / |ours|` of the output and gradients."""
    results = []
    for peer in (False, True):
        one = replace(task, peer=peer, backward=True)
        made = subject(one, task.shape)
        generator = torch.Generator(task.device).manual_seed(1)
        out = run(made, None)
        do = torch.randn(out.shape, generator=generator, device=task.device).to(out.dtype)
        run(made, do)
        grads = made.gradients({name: leaf.grad for name, leaf in made.leaves.items() if leaf.grad is not None})
        results.append({"o": out, **{f"d{name}": grad for name, grad in grads.items()}})
    ours, theirs = results
    return {name: relative(theirs[name], ours[name]) for name in ours if name in theirs}


def relative(x: Tensor, ref: Tensor) -> float:
    """`|x - ref| / |ref|` of norms, in float64."""
    return float((x.double() - ref.double()).norm() / ref.double().norm())

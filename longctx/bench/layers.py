"""One layer over several ranks, on the CPU or a GPU each: what is measured, in the rank that measures it.

A layer with its projections, forward and backward, in float32: lightning by the schedules of states, softmax attention
by those of keys. Every rank has the same inputs and parameters, and holds its part of one sequence without packing.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.mixers.base import Mixer
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.initialise import initialise
from longctx.parallel.attention.cost_model import AttentionShape, estimates
from longctx.parallel.attention.visibility import Reach
from longctx.parallel.layout import Layout, Order
from longctx.parallel.mesh import Mesh
from longctx.parallel.traffic import counted

EPS = 1e-5


@dataclass(frozen=True)
class Method:
    """A layer, by name, with the layout and the schedule that it runs on."""

    title: str
    softmax: bool
    order: Order
    schedule: str


METHODS = {
    "lasp2": Method("LASP-2, all-gather of states", False, "contiguous", "all-gather"),
    "lasp1": Method("LASP-1, ring of states", False, "contiguous", "ring"),
    "ring": Method("ring of keys, zigzag", True, "zigzag", "ring"),
    "plain-ring": Method("ring of keys, contiguous", True, "contiguous", "ring"),
    "all-gather": Method("all-gather of keys, zigzag", True, "zigzag", "all-gather"),
    "ulysses": Method("Ulysses", True, "contiguous", "ulysses"),
}
"""By name, in the order of the table."""


@dataclass(frozen=True)
class Task:
    """A method at one length; heads of `head_dim`, `kv_heads` of them for softmax, in a layer as wide as all heads."""

    method: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int


@dataclass(frozen=True)
class Result:
    """What a method took, forward and backward."""

    task: Task
    seconds: float
    """The median over repeats of the slowest rank."""
    times: list[float]
    waited: float | None
    """Seconds in which a rank stood still for others, of the rank that did longest: the median over repeats. None on
    GPUs, whose streams wait by themselves."""
    received: int
    """Bytes that came to the rank that received most."""
    least: int
    """What the schedule's formula says of these."""
    calls: dict[str, int]
    """Collectives of rank 0."""


def build(task: Task) -> Mixer:
    """The layer, initialised alike on every rank."""
    dim = task.heads * task.head_dim
    if METHODS[task.method].softmax:
        softmax = SoftmaxConfig(heads=task.heads, kv_heads=task.kv_heads, head_dim=task.head_dim)
        mixer: Mixer = softmax.build(dim, 0, 1, EPS)
    else:
        mixer = LightningConfig(heads=task.heads, head_dim=task.head_dim).build(dim, 0, 1, EPS)
    initialise(mixer, 0)
    return mixer


def layout_of(task: Task, mesh: Mesh) -> Layout:
    """One document over all ranks."""
    method = METHODS[task.method]
    layout = Layout.on(mesh, (0, task.tokens), method.order)
    if method.softmax:
        return replace(layout, attention=method.schedule)
    return replace(layout, states=method.schedule)


def least_bytes(task: Task, layout: Layout) -> int:
    """The bytes that a rank has to receive, of the one that receives most, by the schedule's formula."""
    method = METHODS[task.method]
    if method.softmax:
        shape = AttentionShape(task.heads, task.kv_heads, task.head_dim, task.head_dim, 4, Reach())
        return next(each.received for each in estimates(layout, shape) if each.schedule == method.schedule)
    state, own = task.heads * task.head_dim**2, layout.pieces // layout.size
    if method.schedule == "ring":
        # Both ways, but for the ranks at the ends.
        return 4 * state * own * (2 if layout.size > 2 else 1)
    return 4 * 2 * (layout.size - 1) * own * (state + task.heads)


class _Bench:
    """A task on this rank."""

    def __init__(self, task: Task, mesh: Mesh, device: torch.device) -> None:
        self.task, self.device = task, device
        self.layout, self.mixer = layout_of(task, mesh), build(task).to(device)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (1, self.layout.local_length, task.heads * task.head_dim)
        self.x, self.grad = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.times: list[float] = []
        self.waits: list[float] = []
        self.received, self.calls = 0, {"": 0}

    def run(self) -> None:
        """Once, forward and backward, with the other ranks."""
        self.mixer.zero_grad()
        leaf = self.x.detach().requires_grad_()
        _synchronize(self.device)
        dist.barrier()
        began = time.perf_counter()
        with counted() as traffic:
            out: Tensor = self.mixer(leaf, self.layout)
            out.backward(self.grad)
        _synchronize(self.device)
        spent = time.perf_counter() - began
        ranks: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * dist.get_world_size()
        dist.all_gather_object(ranks, (spent, traffic.waited, traffic.received))
        self.times.append(max(each[0] for each in ranks))
        self.waits.append(max(each[1] for each in ranks))
        self.received, self.calls = max(each[2] for each in ranks), dict(traffic.calls)

    def result(self) -> Result:
        """Of all runs but the first, which warms up."""
        return Result(
            task=self.task,
            seconds=statistics.median(self.times[1:]),
            times=self.times[1:],
            waited=statistics.median(self.waits[1:]) if self.device.type == "cpu" else None,
            received=self.received,
            least=least_bytes(self.task, self.layout),
            calls=self.calls,
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(tasks: Sequence[Task], mesh: Mesh) -> list[Result]:
    """Measure tasks that have equally many repeats; every rank has to call it, and gets the same.

    They take turns, so that what else the machine does meets all of them.
    """
    benches = [_Bench(task, mesh, torch.device(mesh.device_type)) for task in tasks]
    for _ in range(tasks[0].repeats + 1):
        for bench in benches:
            bench.run()
    return [bench.result() for bench in benches]

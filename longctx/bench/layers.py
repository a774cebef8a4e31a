"""Sequence-parallel layer benchmark: one layer over several CPU or GPU ranks, as each rank runs it.

A layer with its projections, forward and backward, in float32: lightning attention with each schedule for recurrent
states, softmax attention with each schedule for keys and values. All ranks have the same parameters and shard one
unpacked sequence.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.kernels.attention.block import CAUSAL_MASK
from longctx.mixers.base import Mixer
from longctx.mixers.lightning import LightningConfig
from longctx.mixers.softmax import SoftmaxConfig
from longctx.model.initialise import initialise
from longctx.parallel.attention.cost_model import AttentionShape, estimates
from longctx.parallel.layout import Layout, Order
from longctx.parallel.mesh import Mesh
from longctx.parallel.traffic import count_traffic

EPS = 1e-5


@dataclass(frozen=True)
class Method:
    """A kind of layer with its layout order and schedule."""

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
"""Methods by name, in the order of the table."""


@dataclass(frozen=True)
class LayerTask:
    """A method at one sequence length, in a layer `heads * head_dim` wide; `kv_heads` applies to softmax layers."""

    method: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    repeats: int


@dataclass(frozen=True)
class LayerResult:
    """Measurements of a method, forward and backward."""

    task: LayerTask
    seconds: float
    """Time of the slowest rank, median over repeats."""
    times: list[float]
    waited: float | None
    """Seconds that the longest-waiting rank was blocked on other ranks, median over repeats. None on GPUs, where
    streams wait asynchronously."""
    received: int
    """Bytes received, maximum over ranks."""
    least: int
    """The same by the schedule's formula."""
    calls: dict[str, int]
    """Collective calls of rank 0, by name."""


def build(task: LayerTask) -> Mixer:
    """Build the layer, with the same initial parameters on every rank."""
    dim = task.heads * task.head_dim
    if METHODS[task.method].softmax:
        softmax = SoftmaxConfig(heads=task.heads, kv_heads=task.kv_heads, head_dim=task.head_dim)
        mixer: Mixer = softmax.build(dim, 0, 1, EPS)
    else:
        mixer = LightningConfig(heads=task.heads, head_dim=task.head_dim).build(dim, 0, 1, EPS)
    initialise(mixer, 0)
    return mixer


def layout_of(task: LayerTask, mesh: Mesh) -> Layout:
    """Lay out one document over all ranks."""
    method = METHODS[task.method]
    layout = Layout.on(mesh, (0, task.tokens), method.order)
    if method.softmax:
        return replace(layout, attention=method.schedule)
    return replace(layout, states=method.schedule)


def least_bytes(task: LayerTask, layout: Layout) -> int:
    """Compute the bytes that the busiest rank receives, by the schedule's formula."""
    method = METHODS[task.method]
    if method.softmax:
        shape = AttentionShape(task.heads, task.kv_heads, task.head_dim, task.head_dim, 4, CAUSAL_MASK)
        return next(x.received for x in estimates(layout, shape) if x.schedule == method.schedule)
    state, pieces = task.heads * task.head_dim**2, layout.pieces // layout.size
    if method.schedule == "ring":
        # Both directions, except for the ranks at the ends.
        return 4 * state * pieces * (2 if layout.size > 2 else 1)
    return 4 * 2 * (layout.size - 1) * pieces * (state + task.heads)


class _LayerBench:
    """A task on this rank."""

    def __init__(self, task: LayerTask, mesh: Mesh, device: torch.device) -> None:
        self.task, self.device = task, device
        self.layout, self.mixer = layout_of(task, mesh), build(task).to(device)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (1, self.layout.local_length, task.heads * task.head_dim)
        self.x, self.grad = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.times: list[float] = []
        self.waits: list[float] = []
        self.received, self.calls = 0, {"": 0}

    def run(self) -> None:
        """Run and time one forward and backward pass, with the other ranks."""
        self.mixer.zero_grad()
        leaf = self.x.detach().requires_grad_()
        _synchronize(self.device)
        dist.barrier()
        began = time.perf_counter()
        with count_traffic() as traffic:
            out: Tensor = self.mixer(leaf, self.layout)
            out.backward(self.grad)
        _synchronize(self.device)
        spent = time.perf_counter() - began
        ranks: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * dist.get_world_size()
        dist.all_gather_object(ranks, (spent, traffic.waited, traffic.received))
        self.times.append(max(seconds for seconds, _, _ in ranks))
        self.waits.append(max(waited for _, waited, _ in ranks))
        self.received, self.calls = max(received for _, _, received in ranks), dict(traffic.calls)

    def result(self) -> LayerResult:
        """Summarise all runs except the first, which is a warm-up."""
        return LayerResult(
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


def measure(tasks: Sequence[LayerTask], mesh: Mesh) -> list[LayerResult]:
    """Measure tasks with the same number of repeats. Collective: every rank gets the same results.

    The tasks take turns, so that other load on the machine affects all of them.
    """
    benches = [_LayerBench(task, mesh, torch.device(mesh.device_type)) for task in tasks]
    for _ in range(tasks[0].repeats + 1):
        for bench in benches:
            bench.run()
    return [bench.result() for bench in benches]

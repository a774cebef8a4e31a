"""Verification cases: the parallel layouts to run, and the packing of their sequences."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from longctx.model.config import ModelConfig
from longctx.model.moe import MoeConfig
from longctx.parallel.layout import Layout, Order
from longctx.recipe.tables import ParallelConfig

SEQUENCES = 2
"""Sequences in the compared step."""
SCHEDULED = ("attention", "states")
"""The fields of a case, and of its layout, that select the schedules of attention and recurrent states."""


@dataclass(frozen=True)
class Case:
    """A parallel layout of a step."""

    cp: int
    order: Order
    packed: bool
    dp_shard: int = 1
    dp_replicate: int = 1
    ep: int = 1
    ulysses: int = 1
    attention: str = Layout.attention
    states: str = Layout.states

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.cp

    def __str__(self) -> str:
        axes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "cp": self.cp, "ep": self.ep}
        parts = [f"{name} {size}" for name, size in axes.items() if size > 1]
        if self.cp > 1:
            parts.append(self.order)
        parts += [f"{x} by {getattr(self, x)}" for x in SCHEDULED if getattr(self, x) != getattr(Layout, x)]
        return (", ".join(parts) or "one rank") + (", packed" if self.packed else ", one document")


def reference(packed: bool) -> Case:
    """Return the reference case, a single rank."""
    return Case(cp=1, order="contiguous", packed=packed)


def own_cases(parallel: ParallelConfig) -> tuple[Case, ...]:
    """Return a recipe's own layout of a sequence, packed and not, without data parallelism beyond SEQUENCES."""
    shard = parallel.dp_shard if isinstance(parallel.dp_shard, int) else 1
    dp = (shard, parallel.dp_replicate) if SEQUENCES % (shard * parallel.dp_replicate) == 0 else (1, 1)
    ep = parallel.ep if dp[0] * parallel.cp % parallel.ep == 0 else 1
    layout = parallel.cp, parallel.layout, False, *dp, ep, parallel.ulysses, parallel.attention, parallel.states
    case = Case(*layout)
    return (case, replace(case, packed=True)) if case.ranks > 1 else ()


def cases(max_ranks: int, model: ModelConfig) -> Iterator[Case]:
    """Iterate over layouts on up to `max_ranks` ranks: cp 2 and 4, with and without dp, ep, and all schedules."""
    for packed in (False, True):
        if max_ranks >= SEQUENCES:
            yield Case(1, "contiguous", packed, dp_shard=SEQUENCES)
        for order in ("contiguous", "zigzag"):
            for cp, dp_shard, dp_replicate in ((2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)):
                case = Case(cp, order, packed, dp_shard, dp_replicate)
                if case.ranks <= max_ranks:
                    yield case
        if packed and max_ranks >= 4:
            yield Case(4, "balanced", packed)
    if model.mixture is not None:
        yield from _experts(max_ranks, model.mixture, model.dim)
    if max_ranks >= 2:
        yield from _schedules(4 if max_ranks >= 4 else 2, model)


def _experts(max_ranks: int, moe: MoeConfig, dim: int) -> Iterator[Case]:
    """Iterate over expert-parallel cases: ep over context-parallel ranks, over data-parallel ranks, and over both."""
    for cp, dp_shard, dp_replicate, ep in ((2, 1, 1, 2), (1, 2, 1, 2), (2, 2, 1, 2), (2, 2, 1, 4), (2, 1, 2, 2)):
        rest = cp * dp_shard // ep
        if moe.experts % ep == 0 and dim % rest == 0 and 2 * moe.hidden % rest == 0:
            for packed in (False, True):
                case = Case(cp, "zigzag", packed, dp_shard, dp_replicate, ep)
                if case.ranks <= max_ranks:
                    yield case


def _schedules(cp: int, model: ModelConfig) -> Iterator[Case]:
    """Iterate over all schedules of the model's mixers and routers except the defaults, which other cases use."""
    ulysses_size = cp // 2
    layers = range(len(model.pattern))
    tables = (model.feed_forward(layer) for layer in layers)
    routers = (table.available_schedules(cp, ulysses_size) for table in tables if table is not None)
    available = [model.available_schedules(layer, cp, ulysses_size) for layer in layers] + [
        schedules for schedules in routers if schedules is not None
    ]
    for field, schedule in dict.fromkeys((field, schedule) for field, schedules in available for schedule in schedules):
        if schedule != getattr(Layout, field):
            ulysses = ulysses_size if schedule.startswith("ulysses-") else 1
            case = Case(cp, "zigzag", packed=True, ulysses=ulysses)
            yield replace(case, attention=schedule) if field == "attention" else replace(case, states=schedule)


def documents(length: int, packed: bool, seed: int) -> tuple[int, ...]:
    """Return the document boundaries of a sequence: one document, or several with very different lengths."""
    if not packed or length < 4:
        return (0, length)
    generator = random.Random(seed)
    bounds = {0, length, 1, length - 1}
    if seed % 2 == 0:
        # The other sequences have a document across the middle, where ranks meet.
        bounds |= {length // 2, length // 2 + 1}
    while len(bounds) < min(length, 12):
        bounds.add(int(length * generator.random() ** 2))
    return tuple(sorted(bounds))

"""The layouts that a verification runs, and the sequences it runs them on."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from longctx.model.config import ModelConfig
from longctx.model.moe import MoeConfig
from longctx.parallel.layout import Layout, Order

SEQUENCES = 2
"""Sequences in the one step that is compared."""
SCHEDULED = ("attention", "states")
"""The fields of a case and of its layout that say how layers reach other ranks' tokens."""


@dataclass(frozen=True)
class Case:
    """One way to spread a step over ranks."""

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
        """Ranks that it takes."""
        return self.dp_replicate * self.dp_shard * self.cp

    def __str__(self) -> str:
        axes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "cp": self.cp, "ep": self.ep}
        words = [f"{name} {size}" for name, size in axes.items() if size > 1]
        if self.cp > 1:
            words.append(self.order)
        words += [f"{x} by {getattr(self, x)}" for x in SCHEDULED if getattr(self, x) != getattr(Layout, x)]
        return (", ".join(words) or "one rank") + (", packed" if self.packed else ", one document")


def reference(packed: bool) -> Case:
    """One rank, which everything is compared with."""
    return Case(cp=1, order="contiguous", packed=packed)


def cases(most_ranks: int, model: ModelConfig) -> Iterator[Case]:
    """The layouts over up to `most_ranks` ranks, cp 2 and 4, with and without dp, and every schedule of the model's."""
    for packed in (False, True):
        if most_ranks >= SEQUENCES:
            yield Case(1, "contiguous", packed, dp_shard=SEQUENCES)
        for order in ("contiguous", "zigzag"):
            for cp, dp_shard, dp_replicate in ((2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)):
                case = Case(cp, order, packed, dp_shard, dp_replicate)
                if case.ranks <= most_ranks:
                    yield case
        if packed and most_ranks >= 4:
            yield Case(4, "balanced", packed)
    if model.mixture is not None:
        yield from _experts(most_ranks, model.mixture, model.dim)
    if most_ranks >= 2:
        yield from _schedules(4 if most_ranks >= 4 else 2, model)


def _experts(most_ranks: int, moe: MoeConfig, dim: int) -> Iterator[Case]:
    """Experts divided over ranks that split a sequence, over ranks that read others, and over both."""
    for cp, dp_shard, dp_replicate, ep in ((2, 1, 1, 2), (1, 2, 1, 2), (2, 2, 1, 2), (2, 2, 1, 4), (2, 1, 2, 2)):
        rest = cp * dp_shard // ep
        if moe.experts % ep == 0 and dim % rest == 0 and 2 * moe.hidden % rest == 0:
            for packed in (False, True):
                case = Case(cp, "zigzag", packed, dp_shard, dp_replicate, ep)
                if case.ranks <= most_ranks:
                    yield case


def _schedules(cp: int, model: ModelConfig) -> Iterator[Case]:
    """Each way in which a mixer or a router can reach other ranks' tokens but the one that the other cases take."""
    both = cp // 2
    layers = range(len(model.pattern))
    tables = (model.feed_forward(layer) for layer in layers)
    routers = (table.available_schedules(cp, both) for table in tables if table is not None)
    ways = [model.available_schedules(layer, cp, both) for layer in layers] + [
        way for way in routers if way is not None
    ]
    for field, schedule in dict.fromkeys((field, schedule) for field, schedules in ways for schedule in schedules):
        if schedule != getattr(Layout, field):
            ulysses = both if schedule.startswith("ulysses-") else 1
            case = Case(cp, "zigzag", packed=True, ulysses=ulysses)
            yield replace(case, attention=schedule) if field == "attention" else replace(case, states=schedule)


def documents(length: int, packed: bool, seed: int) -> tuple[int, ...]:
    """Where documents begin and end in a sequence: one, or several of very different lengths, some of one token."""
    if not packed or length < 4:
        return (0, length)
    chance = random.Random(seed)
    bounds = {0, length, 1, length - 1}
    if seed % 2 == 0:
        # The other sequences have a document that lies over the middle, where ranks meet.
        bounds |= {length // 2, length // 2 + 1}
    while len(bounds) < min(length, 12):
        bounds.add(int(length * chance.random() ** 2))
    return tuple(sorted(bounds))

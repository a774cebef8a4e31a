"""Ranks of the job: on which node each of them runs, and the groups inside and between nodes."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from longctx.hardware_profile import Scope
from longctx.parallel.collectives import all_gather_dict
from longctx.parallel.mesh import Axis

T = TypeVar("T")


def no_step() -> None:
    """Do nothing before a measurement, which else tells the monitor of hangs that the one before has ended."""


def gather(value: T) -> list[T]:
    """Return the values of all ranks in rank order: small host objects. Collective."""
    axis = Axis.from_group(dist.group.WORLD)
    return list(all_gather_dict({str(dist.get_rank()): value}, axis).values())


@dataclass(frozen=True)
class Places:
    """Where the ranks are."""

    nodes: tuple[tuple[int, ...], ...]
    """Ranks of each node, ascending; nodes in the order of their lowest ranks."""

    @classmethod
    def of(cls, machines: Sequence[object]) -> "Places":
        """Return the places of ranks from what names each rank's machine, in rank order."""
        ranks: dict[object, list[int]] = defaultdict(list)
        for rank, machine in enumerate(machines):
            ranks[machine].append(rank)
        return cls(tuple(map(tuple, ranks.values())))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return sum(map(len, self.nodes))

    @property
    def leaders(self) -> tuple[int, ...]:
        """Lowest rank of each node."""
        return tuple(ranks[0] for ranks in self.nodes)

    @property
    def most_per_node(self) -> int:
        """Ranks of the node with the most."""
        return max(map(len, self.nodes))

    def node_of(self, rank: int) -> int:
        """Return the number of a rank's node."""
        return next(number for number, ranks in enumerate(self.nodes) if rank in ranks)

    def counterpart(self, rank: int) -> int:
        """Return the rank of the next node that is in the same place there; of a single node, the rank itself."""
        number = self.node_of(rank)
        following = self.nodes[(number + 1) % len(self.nodes)]
        return following[self.nodes[number].index(rank) % len(following)]

    def groups(self) -> dict[Scope, list[tuple[int, ...]]]:
        """Return the groups of each scope that has groups of two ranks or more; `all` only if it is another group."""
        between = [
            tuple(ranks[local] for ranks in self.nodes if local < len(ranks)) for local in range(self.most_per_node)
        ]
        scopes: dict[Scope, list[tuple[int, ...]]] = {"node": list(self.nodes), "between": between}
        if len(self.nodes) > 1 and self.most_per_node > 1:
            scopes["all"] = [tuple(range(self.size))]
        large = {scope: [ranks for ranks in groups if len(ranks) > 1] for scope, groups in scopes.items()}
        return {scope: groups for scope, groups in large.items() if groups}


def make_groups(groups: Sequence[tuple[int, ...]], timeout: float) -> ProcessGroup | None:
    """Create process groups; return this rank's, None if it is in none. Collective.

    `timeout`: seconds per collective.
    """
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
        if dist.get_rank() in ranks:
            own = group
    return own

"""What routers say: over a step, summed over batches and ranks in one collective; and from evaluation to evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.engines.metrics import RouterMetrics
from longctx.errors import UserError
from longctx.moe.report import RouterReport, real_rows
from longctx.parallel.collectives import all_reduce, gather_named
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis

ONE_STAGE = Axis()
"""Of a model whose layers are all on every rank."""
SAMPLE = 16384
"""Tokens of a held-out sequence on a rank, at most, whose choices are remembered: 8 bytes each, in every layer."""


class NotFiniteError(UserError):
    """A router's logits were no finite numbers: where its tokens went means nothing."""


@dataclass(frozen=True)
class Routed:
    """One router's sums over the tokens of a step."""

    counts: Tensor
    """`[E]` float64: choices that fell on each expert or head."""
    tokens: float
    entropy: float
    """Nats, summed over tokens."""
    dropped: float
    """Choices that a capacity dropped."""
    not_finite: float
    """Batches in which a logit was no finite number."""

    @property
    def metrics(self) -> RouterMetrics:
        """What is shown of it; NaN where nothing was routed."""
        choices = float(self.counts.sum())
        return RouterMetrics(
            imbalance=float(self.counts.max()) * len(self.counts) / choices if choices else math.nan,
            entropy=self.entropy / self.tokens if self.tokens else math.nan,
            dropped=self.dropped / choices if choices else math.nan,
        )


class Routing:
    """What the routers of a model say over a step, by the names of their layers; empty where there is none."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def add(self, reports: Mapping[str, RouterReport]) -> None:
        """Add a batch's. Waits for nothing."""
        for name, report in reports.items():
            sums = torch.stack(
                [x.to(torch.float64) for x in (report.tokens, report.entropy, report.dropped, ~report.finite)]
            ).detach()
            row = torch.cat([sums, report.counts.to(torch.float64)])
            self._rows[name] = self._rows[name] + row if name in self._rows else row

    def sum_over_ranks(self, device: torch.device, group: ProcessGroup | None = None, stages: Axis = ONE_STAGE) -> None:
        """Add up the sums of the ranks of a group (None: all), which have the same layers, and take those of other
        `stages` of a pipeline beside them. A collective where there is a router, and where there are stages."""
        if self._rows:
            summed = all_reduce(torch.cat(list(self._rows.values())).to(device), group).cpu()
            parts = summed.split([len(row) for row in self._rows.values()])
            self._rows = dict(zip(self._rows, (part.clone() for part in parts), strict=True))
        self._rows = gather_named(self._rows, stages)

    @property
    def layers(self) -> dict[str, Routed]:
        """Each router's sums."""
        return {name: Routed(row[4:], *(float(x) for x in row[:4])) for name, row in self._rows.items()}

    def check_finite(self) -> None:
        """Raise NotFiniteError, naming the first layer, where a router's logits were not finite."""
        for name, routed in self.layers.items():
            if routed.not_finite:
                raise NotFiniteError(f"{name}: the router's logits are not all finite numbers")


class Choices:
    """What routers chose for held-out tokens, to be compared with what they choose at the next evaluation.

    Of each sequence and rank at most `SAMPLE` tokens, evenly spread.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, int], Tensor] = {}
        self._changed: dict[str, Tensor] = {}

    def add(self, number: int, layout: Layout, reports: Mapping[str, RouterReport]) -> None:
        """Take what routers say of held-out sequence `number`, and count what has changed since the last time."""
        tokens = real_rows(layout, torch.device("cpu")).nonzero()[:, 0]
        tokens = tokens[:: max(1, -(-len(tokens) // SAMPLE))]
        for name, report in reports.items():
            now = report.choice[0].cpu()[tokens]
            before = self._before.get((name, number))
            sums = self._changed.setdefault(name, torch.zeros(2, dtype=torch.float64))
            if before is not None:
                sums += torch.tensor([float((now != before).sum()), float(len(now))], dtype=torch.float64)
            self._before[name, number] = now

    def fluctuation(
        self, names: Sequence[str], device: torch.device, group: ProcessGroup | None = None, stages: Axis = ONE_STAGE
    ) -> dict[str, float]:
        """For each router the share of tokens, over the ranks of a group (None: all), whose choice has changed; those
        that were compared, of all `stages` of a pipeline.

        A collective where there are routers, of which every rank of the group names the same ones, in the same order,
        and where there are stages.
        """
        summed: list[list[float]] = []
        if names:
            sums = torch.stack([self._changed.pop(name, torch.zeros(2, dtype=torch.float64)) for name in names])
            summed = all_reduce(sums.to(device), group).tolist()
        found = {name: changed / compared for name, (changed, compared) in zip(names, summed, strict=True) if compared}
        return gather_named(found, stages)

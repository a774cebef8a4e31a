"""Router statistics: load, entropy and drops of a step, reduced over ranks in one collective; routing fluctuation
between evaluations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longctx.engines.metrics import RouterMetrics
from longctx.errors import UserError
from longctx.moe.report import RouterReport, token_mask
from longctx.parallel.collectives import all_gather_dict, all_reduce
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis

ONE_STAGE = Axis()
"""Pipeline axis of a model without pipeline parallelism."""
SAMPLE = 16384
"""Maximum number of tokens per held-out sequence and rank whose routing is kept: 8 bytes per token per router."""


class NonFiniteLogitsError(UserError):
    """A router's logits are not finite, so its routing is meaningless."""


@dataclass(frozen=True)
class RouterSums:
    """One router's statistics, summed over the tokens of a step."""

    counts: Tensor
    """`[E]` float64: tokens routed to each expert or head."""
    tokens: float
    entropy: float
    """Nats, summed over tokens."""
    dropped: float
    """(token, expert) pairs dropped for capacity."""
    not_finite: float
    """Batches with a logit that is not finite."""

    @property
    def metrics(self) -> RouterMetrics:
        """The logged metrics; NaN if nothing was routed."""
        pairs = float(self.counts.sum())
        return RouterMetrics(
            imbalance=float(self.counts.max()) * len(self.counts) / pairs if pairs else math.nan,
            entropy=self.entropy / self.tokens if self.tokens else math.nan,
            dropped=self.dropped / pairs if pairs else math.nan,
        )


class RouterStats:
    """Statistics of all routers over a step, by layer name; empty for a model without routers."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def add(self, reports: Mapping[str, RouterReport]) -> None:
        """Add the reports of one batch, without a device synchronisation."""
        for name, report in reports.items():
            sums = torch.stack(
                [x.to(torch.float64) for x in (report.tokens, report.entropy, report.dropped, ~report.finite)]
            ).detach()
            row = torch.cat([sums, report.counts.to(torch.float64)])
            self._rows[name] = self._rows[name] + row if name in self._rows else row

    @property
    def sums(self) -> Tensor:
        """All statistics of all routers in one tensor, `[N]` float64."""
        return torch.cat(list(self._rows.values())) if self._rows else torch.zeros(0, dtype=torch.float64)

    @sums.setter
    def sums(self, sums: Tensor) -> None:
        parts = sums.split([len(row) for row in self._rows.values()])
        self._rows = dict(zip(self._rows, (part.clone() for part in parts), strict=True))

    def sum_over_ranks(self, device: torch.device, group: ProcessGroup | None = None, stages: Axis = ONE_STAGE) -> None:
        """All-reduce over the ranks of `group` (None: all), which hold the same layers, and gather the layers of other
        pipeline `stages`. Collective if the model has a router, and if there are stages."""
        if self._rows:
            self.sums = all_reduce(self.sums.to(device), group).cpu()
        self._rows = all_gather_dict(self._rows, stages)

    @property
    def layers(self) -> dict[str, RouterSums]:
        """Each router's sums, by layer name."""
        return {name: RouterSums(row[4:], *(float(x) for x in row[:4])) for name, row in self._rows.items()}

    def check_finite(self) -> None:
        """Raise NonFiniteLogitsError, naming the first layer, if a router's logits were not finite."""
        for name, sums in self.layers.items():
            if sums.not_finite:
                raise NonFiniteLogitsError(f"{name}: the router's logits are not all finite numbers")


class RoutingFluctuation:
    """Routing fluctuation: the share of held-out tokens routed differently than at the previous evaluation.

    Compares at most `SAMPLE` evenly spaced tokens per sequence and rank.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, int], Tensor] = {}
        self._changed: dict[str, Tensor] = {}

    def add(self, number: int, layout: Layout, reports: Mapping[str, RouterReport]) -> None:
        """Record the routing of held-out sequence `number` and count the tokens whose routing changed."""
        tokens = token_mask(layout, torch.device("cpu")).nonzero()[:, 0]
        tokens = tokens[:: max(1, -(-len(tokens) // SAMPLE))]
        for name, report in reports.items():
            now = report.choice[0].cpu()[tokens]
            before = self._before.get((name, number))
            sums = self._changed.setdefault(name, torch.zeros(2, dtype=torch.float64))
            if before is not None:
                sums += torch.tensor([float((now != before).sum()), float(len(now))], dtype=torch.float64)
            self._before[name, number] = now

    def rates(
        self, names: Sequence[str], device: torch.device, group: ProcessGroup | None = None, stages: Axis = ONE_STAGE
    ) -> dict[str, float]:
        """Return the share of tokens whose routing changed, by router, over the ranks of `group` (None: all) and all
        pipeline `stages`, and reset the counts. Routers without an earlier evaluation are left out.

        Collective if there are routers or stages. Every rank of the group passes the same names in the same order.
        """
        summed: list[list[float]] = []
        if names:
            sums = torch.stack([self._changed.pop(name, torch.zeros(2, dtype=torch.float64)) for name in names])
            summed = all_reduce(sums.to(device), group).tolist()
        rates = {name: changed / compared for name, (changed, compared) in zip(names, summed, strict=True) if compared}
        return all_gather_dict(rates, stages)

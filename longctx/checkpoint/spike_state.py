"""State of spike detection in a checkpoint: recent losses and gradient norms of the run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SpikeState:
    """Recent steps of a run and its spikes so far (`longctx.train.spikes`)."""

    losses: tuple[float, ...] = ()
    """Losses, in nats per token, of the latest steps with an update, oldest first."""
    grad_norms: tuple[float, ...] = ()
    """Gradient norms, before clipping, of the same steps."""
    in_a_row: int = 0
    """Number of latest steps that were spikes, without another one between them."""
    skipped: int = 0
    """Steps of the run whose update was not applied."""

    @classmethod
    def parse(cls, stored: Mapping[str, object]) -> "SpikeState":
        """Parse the JSON form. Raises ValueError, KeyError or TypeError if it is of something else."""
        losses, grad_norms = _numbers("losses", stored), _numbers("grad_norms", stored)
        if len(losses) != len(grad_norms):
            raise ValueError("spikes has losses and grad_norms of different steps")
        return cls(losses, grad_norms, _count("in_a_row", stored), _count("skipped", stored))


def _numbers(name: str, stored: Mapping[str, object]) -> tuple[float, ...]:
    value = stored[name]
    if not isinstance(value, list) or not all(isinstance(x, int | float) and math.isfinite(x) for x in value):
        raise ValueError(f"spikes has {name} that are not a list of finite numbers")
    return tuple(map(float, value))


def _count(name: str, stored: Mapping[str, object]) -> int:
    value = stored[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"spikes has {name} {value!r}, expected a number from 0")
    return value

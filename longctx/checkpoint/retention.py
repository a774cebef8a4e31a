"""Retention: which checkpoints of a run are kept, the latest ones, milestones and the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss of the parameters in a checkpoint."""

    loss: float
    """Nats per token."""
    sequences: int
    """Held-out sequences over which it is the mean."""
    stage: str | None = None
    """Stage of the run in which it was measured; sequences of others may be longer."""

    @classmethod
    def parse(cls, stored: Mapping[str, object]) -> "HeldOut":
        """Parse the JSON form. Raises ValueError, KeyError or TypeError if it is of something else."""
        loss, sequences, stage = stored["loss"], stored["sequences"], stored.get("stage")
        if not isinstance(loss, int | float) or not math.isfinite(loss) or not isinstance(sequences, int):
            raise ValueError(f"heldout_loss has the loss {loss!r} over {sequences!r} sequences")
        if not isinstance(stage, str | None):
            raise ValueError(f"heldout_loss is of the stage {stage!r}")
        return cls(float(loss), sequences, stage)


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints of a run are kept."""

    keep: int
    """Number of latest checkpoints."""
    every: int | None = None
    """Steps between milestones, which are kept besides; None: there are none."""
    sequences: int | None = None
    """The checkpoint with the lowest loss on so many held-out sequences is kept besides; None: it is not."""
    stage: str | None = None
    """Stage in which that loss was measured."""
    stage_ends: frozenset[int] = frozenset()
    """Last steps of the stages before, whose checkpoints are kept besides."""

    def best(self, losses: Mapping[int, HeldOut]) -> int | None:
        """Return the step with the lowest held-out loss, the later of two equal ones; None if none is known.

        `losses`: those known, by step. A mean over another number of sequences or in another stage is not compared.
        """
        wanted = (self.sequences, self.stage)
        comparable = {step: of.loss for step, of in losses.items() if (of.sequences, of.stage) == wanted}
        return min(comparable, key=lambda step: (comparable[step], -step), default=None)

    def surplus(self, steps: Sequence[int], losses: Mapping[int, HeldOut]) -> list[int]:
        """Return which of `steps`, ascending, are not to be kept, ascending; `losses` as for `best`."""
        best = self.best(losses)
        return [step for step in steps[: -self.keep] if step != best and not self._is_milestone(step)]

    def _is_milestone(self, step: int) -> bool:
        return step in self.stage_ends or (self.every is not None and step % self.every == 0)

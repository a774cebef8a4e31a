"""State of a run in a checkpoint, beside its tensors."""

from dataclasses import dataclass, field
from typing import Any

from longctx.checkpoint.retention import HeldOut
from longctx.checkpoint.spike_state import SpikeState


@dataclass(frozen=True)
class TrainerState:
    """The state of a run in a checkpoint, beside the tensors."""

    step: int
    sequences: int
    """Sequences read so far in the stage, over all ranks."""
    tokens: int
    """Tokens trained on so far."""
    data: str
    """Fingerprint of the sequence stream: corpus, order and sequence length."""
    model: dict[str, Any]
    """The model's configuration, including its vocabulary size."""
    speeds: dict[str, float] | None = None
    """Speeds by which attention schedules were chosen, so that a resumed run chooses the same; None if not measured."""
    format: str = "torch"
    """Names and shapes of the tensors: `torch`, the built-in model's, or `megatron`, Megatron-Core's."""
    heldout: str | None = None
    """Fingerprint of the held-out part that the run was evaluated on; None if it was not, or if an earlier version of
    longctx wrote the checkpoint."""
    spikes: SpikeState = field(default_factory=SpikeState)
    """Recent losses and gradient norms, so that a resumed run takes the same decisions."""
    heldout_loss: HeldOut | None = None
    """Held-out loss of exactly the parameters in the checkpoint; None if it was not measured."""
    stages: dict[str, int] = field(default_factory=dict)
    """The step after which each stage began, by name, in order; the last is that of the checkpoint. Empty if the recipe
    has no stages."""

    @property
    def stage(self) -> str | None:
        """Name of the stage; None if the recipe has no stages."""
        return next(reversed(self.stages), None)

    @property
    def stage_start(self) -> int:
        """The step after which the stage began."""
        return next(reversed(self.stages.values()), 0)


def parse_state(stored: dict[str, Any]) -> TrainerState:
    """Parse the JSON form of a state. Raises ValueError, KeyError or TypeError if it is of something else."""
    content = dict(stored)
    if "spikes" in content:
        content["spikes"] = SpikeState.parse(content["spikes"])
    if content.get("heldout_loss") is not None:
        content["heldout_loss"] = HeldOut.parse(content["heldout_loss"])
    stages = content.get("stages", {})
    if not isinstance(stages, dict) or not all(type(start) is int and start >= 0 for start in stages.values()):
        raise ValueError(f"stages has {stages!r}, expected the step after which each stage began")
    return TrainerState(**content)

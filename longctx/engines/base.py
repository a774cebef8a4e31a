"""Engine protocol: the interface through which the trainer steps, evaluates and checkpoints a distributed model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.checkpoint.weights import Weights
from longctx.engines.router_stats import RouterStats
from longctx.model.decoder import Losses
from longctx.parallel.attention.cost_model import ScheduleChoice
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh


@dataclass(frozen=True)
class Batch:
    """This rank's tokens and labels of one sequence, `[1, T_local]` int64 on the device, and their layout."""

    tokens: Tensor
    labels: Tensor
    layout: Layout
    virtual: "tuple[Batch, ...]" = ()
    """The batches of the virtual ranks that this process hosts, if there are any."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step, over all ranks."""

    loss: float
    """Mean over the labels, in nats; auxiliary losses of routers are not included."""
    grad_norm: float
    """Before clipping."""
    router_stats: RouterStats
    skipped: bool = False
    """Whether the update was not applied: parameters, optimizer state and routing biases are as before."""


class Engine(Protocol):
    """A distributed model and its optimizer. Every method is collective: all ranks call it."""

    mesh: Mesh
    device: torch.device
    startup_messages: Sequence[str]
    """Sentences that the trainer logs before the first step."""

    @property
    def parameters(self) -> int:
        """Number of trainable parameters over all ranks, each counted once."""

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Run one optimizer step on all ranks' `batches`, the same number on each, at learning rate `lr`.

        The loss is the mean over all labels plus the routers' auxiliary losses. Raises NonFiniteLogitsError, before
        any parameter changes, if a router's logits are not finite.
        """

    def losses(self, batch: Batch) -> Losses:
        """Compute the losses of a held-out batch, without router noise; router reports cover this rank's layers."""

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, ScheduleChoice]:
        """Describe the attention schedule selected for a layout, by layer name."""

    def flops(self, layout: Layout) -> int:
        """Count the FLOPs of one forward pass over this rank's tokens of one sequence."""

    def load_weights(self, weights: Weights) -> None:
        """Replace the random initialisation with `weights`. Raises UserError if they cannot be read."""

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """Start writing a checkpoint; the model may change as soon as this returns."""

    def load(self, path: Path) -> None:
        """Resume from a checkpoint of this engine, saved on any mesh. Raises UserError if it cannot be read."""

    def close(self) -> None:
        """Release external resources before the process group is destroyed."""

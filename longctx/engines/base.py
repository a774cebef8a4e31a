"""The engine protocol: what the trainer asks of whatever holds the model and its optimizer on ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from longctx.checkpoint.save import Checkpointer, TrainerState
from longctx.checkpoint.weights import Weights
from longctx.engines.router_stats import Routing
from longctx.model.decoder import Losses
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Mesh


@dataclass(frozen=True)
class Batch:
    """This rank's part of one sequence: tokens and labels `[1, T_local]` int64 on the device."""

    tokens: Tensor
    labels: Tensor
    layout: Layout


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, over all ranks."""

    loss: float
    """Mean over the labels, in nats, without the routers' losses."""
    grad_norm: float
    """Before clipping."""
    routing: Routing


class Engine(Protocol):
    """A model and its optimizer on ranks, as the trainer sees them; every rank calls every method."""

    mesh: Mesh
    device: torch.device
    notes: Sequence[str]
    """What to tell the user at the start, in sentences."""

    @property
    def parameters(self) -> int:
        """Trained numbers, over all ranks, each counted once."""

    def step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over all ranks' `batches`, equally many on each, at the learning rate `lr`.

        Its loss is the mean over all labels, plus the routers' losses. Raises NotFiniteError, before anything is
        changed, where a router's logits are not finite.
        """

    def losses(self, batch: Batch) -> Losses:
        """The losses of a batch that is not trained on, without noise; what routers say is of this rank's layers."""

    def attention_schedules(self, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
        """The schedules of attention that were chosen for a layout, in words, by layer."""

    def flops(self, layout: Layout) -> int:
        """Multiplications and additions of one forward pass over this rank's tokens of one sequence."""

    def load_weights(self, weights: Weights) -> None:
        """Begin with these in the place of drawn ones. Raises UserError where they cannot be read."""

    def save(self, checkpointer: Checkpointer, state: TrainerState) -> None:
        """Begin to write a checkpoint; the model may change when this returns."""

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of this engine's, written on any ranks. Raises UserError where it cannot be read."""

    def close(self) -> None:
        """Let go of what it holds beyond itself, before the process group ends."""

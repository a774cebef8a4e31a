"""Loss spikes: steps whose finite loss or gradient norm jumps, and what a run does about them.

A step is a spike if its loss, or the logarithm of its gradient norm, exceeds the median of a window by more than
`deviations` robust standard deviations. The window is the latest steps whose update was applied; until it is full no
step is a spike, since the first losses fall fast and say little about the next one. Why so:

- Median and median absolute deviation (times 1.4826: the standard deviation, of normal numbers) do not move with a few
  spikes in the window. A mean and a standard deviation would, and a second spike would pass for usual.
- The loss is a logarithm, of perplexity, so its noise adds; that of the gradient norm multiplies. Hence its logarithm.
- Only jumps upwards: nothing is wrong with a batch that is easy.
- A deviation has a least value, `LEAST_LOSS` and `LEAST_NORM`, or a loss that hardly varies would make its own rounding
  a spike.
- A skipped step stays out of the window, or enough of them would make their loss the usual one. A level that stays
  high is not skipped for ever all the same: the run stops after `max_skips` steps in a row.

The decision depends on nothing but recipe, window and step. The window is part of the trainer state, so a resumed run
takes the same decisions. Loss and gradient norm are sums over all ranks; ranks agree on a decision that changes what
they do next all the same, since a rank that continued by itself would wait for the others until the timeout.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from longctx.checkpoint.read import step_of
from longctx.checkpoint.spike_state import SpikeState
from longctx.engines.base import Batch, Engine, StepResult
from longctx.engines.metrics import SpikeMetrics
from longctx.engines.torch_engine import TorchEngine
from longctx.parallel.collectives import all_reduce
from longctx.recipe.tables import SpikeConfig

LEAST_LOSS = 0.01
"""Least robust standard deviation of the loss, in nats per token."""
LEAST_NORM = 0.1
"""Least robust standard deviation of the logarithm of the gradient norm: a tenth of the norm."""
MAX_SKIPS = 8
"""Default of `spikes.max_skips`."""


@dataclass(frozen=True)
class Usual:
    """Usual value of a number over the window, and the limit above which it is a spike."""

    value: float
    limit: float


def usual(values: Sequence[float], deviations: float, least: float) -> Usual:
    """Return the median of `values` and the limit above it: `deviations` robust standard deviations, of at least
    `least` each."""
    middle = median(values)
    deviation = 1.4826 * median(abs(value - middle) for value in values)
    return Usual(middle, middle + deviations * max(deviation, least))


class SpikeWatch:
    """Finds the spikes of a run and applies its policy. All ranks have one, with the same state."""

    def __init__(self, config: SpikeConfig, state: SpikeState, device: torch.device) -> None:
        """Continue from the `state` of a checkpoint; `device`: where ranks agree."""
        self._config, self._device = config, device
        self._max_skips = config.max_skips or MAX_SKIPS
        self.state = state

    def step(self, engine: Engine, batches: Sequence[Batch], lr: float) -> StepResult:
        """Take the engine's step, without its update if it is a spike and the policy is to skip. Collective."""
        if self._config.policy != "skip":
            return engine.step(batches, lr)
        assert isinstance(engine, TorchEngine), "recipe.check was not called"
        return engine.step(batches, lr, self._skip)

    def observe(self, step: int, result: StepResult) -> SpikeMetrics | None:
        """Add a step with a finite loss and gradient norm to the state; return what there is to say of it, if it is a
        spike. Collective."""
        limits = self._limits()
        spike = result.skipped or self._exceeds(limits, result.loss, result.grad_norm)
        if self._config.policy == "stop":
            spike = self._on_any_rank(spike)
        self._add(result, spike)
        if not spike or limits is None:
            return None
        loss, norm = limits
        return SpikeMetrics(
            step=step,
            loss=result.loss,
            usual_loss=loss.value,
            loss_limit=loss.limit,
            grad_norm=result.grad_norm,
            usual_grad_norm=_exp(norm.value),
            grad_norm_limit=_exp(norm.limit),
            in_a_row=self.state.in_a_row,
            action=self._action(),
        )

    def _limits(self) -> tuple[Usual, Usual] | None:
        """Return what is usual of the loss and of the norm's logarithm; None before the window is full."""
        window, deviations = self._config.window, self._config.deviations
        losses, norms = self.state.losses[-window:], self.state.grad_norms[-window:]
        if len(losses) < window:
            return None
        return usual(losses, deviations, LEAST_LOSS), usual([*map(_log, norms)], deviations, LEAST_NORM)

    @staticmethod
    def _exceeds(limits: tuple[Usual, Usual] | None, loss: float, norm: float) -> bool:
        return limits is not None and (loss > limits[0].limit or _log(norm) > limits[1].limit)

    def _skip(self, loss: float, norm: float) -> bool:
        """Whether to skip the update of a step, on all ranks the same. A norm that is not finite ends the run."""
        return self._on_any_rank(not math.isfinite(norm) or self._exceeds(self._limits(), loss, norm))

    def _on_any_rank(self, spike: bool) -> bool:
        return all_reduce(torch.tensor(float(spike), device=self._device)).item() > 0

    def _add(self, result: StepResult, spike: bool) -> None:
        state, window = self.state, self._config.window
        if not result.skipped:
            losses, norms = (*state.losses, result.loss), (*state.grad_norms, result.grad_norm)
            state = replace(state, losses=losses[-window:], grad_norms=norms[-window:])
        self.state = replace(
            state, in_a_row=state.in_a_row + 1 if spike else 0, skipped=state.skipped + int(result.skipped)
        )

    def _action(self) -> Literal["reported", "skipped", "stopped"]:
        match self._config.policy:
            case "report":
                return "reported"
            case "stop":
                return "stopped"
            case "skip":
                return "stopped" if self.state.in_a_row >= self._max_skips else "skipped"


def _log(norm: float) -> float:
    return math.log(max(norm, sys.float_info.min))


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm <= _log(sys.float_info.max) else math.inf


def message(spike: SpikeMetrics) -> str | None:
    """Return the line to print about a spike; None if the run stops at it, or it follows one that was reported."""
    if spike.action == "stopped" or (spike.action == "reported" and spike.in_a_row > 1):
        return None
    row = f", {spike.in_a_row} in a row" if spike.in_a_row > 1 else ""
    done, policy = ("skipped", "skip") if spike.action == "skipped" else ("applied", "report")
    return f"Spike at step {spike.step}{row}: {_numbers(spike)}. Its update is {done} (spikes.policy = {policy!r})."


def stop_text(spike: SpikeMetrics, checkpoints: Sequence[Path]) -> str:
    """Return the text of the error that ends a run at a spike; `checkpoints` of the run, oldest first."""
    source = find_sound(checkpoints, spike.step - spike.in_a_row + 1)
    again = "There is no earlier checkpoint: start again in another directory (--out)"
    if source is not None:
        again = f"Resume with --resume {source}"
    row = f", the last of {spike.in_a_row} spikes in a row" if spike.in_a_row > 1 else ""
    return (
        f"step {spike.step}: {_numbers(spike)}{row}. Training stopped without saving this step. {again}, and with a "
        "lower optimizer.lr, a longer schedule.warmup, a smaller train.clip, or another spikes.policy"
    )


def find_sound(checkpoints: Sequence[Path], spike: int) -> Path | None:
    """Return the latest checkpoint whose parameters had a usual loss, before the step that is the first spike.

    The loss of step n is that of the parameters after step n - 1, so a checkpoint of step n - 1 may be what is wrong:
    it is returned only if there is no earlier one. None if there is none at all.
    """
    earlier = [path for path in checkpoints if step_of(path) < spike]
    sound = [path for path in earlier if step_of(path) < spike - 1]
    return max(sound or earlier, default=None)


def _numbers(spike: SpikeMetrics) -> str:
    return (
        f"loss {spike.loss:.4g} (usual {spike.usual_loss:.4g}, limit {spike.loss_limit:.4g}), grad norm "
        f"{spike.grad_norm:.3g} (usual {spike.usual_grad_norm:.3g}, limit {spike.grad_norm_limit:.3g})"
    )

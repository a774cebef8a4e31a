"""Kept checkpoints of a run, from its recipe: milestones, the best one, and what the run says of them."""

import math
from pathlib import Path

from longctx.checkpoint.retention import RetentionPolicy
from longctx.recipe import Recipe
from longctx.recipe.tables import CheckpointConfig


def build_retention(config: CheckpointConfig, heldout_sequences: int | None) -> RetentionPolicy:
    """Return which checkpoints are kept; `heldout_sequences`: in an evaluation, None if there is none."""
    every = None if config.keep_every == "none" else config.keep_every
    return RetentionPolicy(config.keep, every, None if config.keep_best is False else heldout_sequences)


def unknown_best_warning(recipe: Recipe) -> str | None:
    """Return the warning, if so, that no checkpoint before the last can be the best: none is written where there is
    an evaluation."""
    evaluation, checkpoint, steps = recipe.evaluation, recipe.checkpoint, recipe.train.steps
    if evaluation is None or checkpoint.keep_best is False or checkpoint.every >= steps:
        return None
    if math.lcm(evaluation.every, checkpoint.every) < steps:
        return None
    return (
        "checkpoint.keep_best: no checkpoint before the last one is at the step of an evaluation, so none can be kept "
        f"as the best; make one of checkpoint.every = {checkpoint.every} and evaluation.every = {evaluation.every} a "
        "multiple of the other"
    )


def best_text(best: tuple[Path, float] | None) -> str:
    """Return the line, or nothing, about the best checkpoint and its held-out loss."""
    return "" if best is None else f"\nBest held-out loss: {best[1]:.4f} nats per token, of {best[0]}"

"""Kept checkpoints of a run, from its recipe: milestones, the best one, and what the run says of them."""

import math
from collections.abc import Mapping
from pathlib import Path

from longctx.checkpoint.retention import RetentionPolicy
from longctx.recipe import Recipe
from longctx.recipe.tables import CheckpointConfig


def build_retention(
    config: CheckpointConfig, heldout_sequences: int | None, stages: Mapping[str, int]
) -> RetentionPolicy:
    """Return which checkpoints are kept. `heldout_sequences`: in an evaluation, None if there is none; `stages`: as in
    the trainer's state."""
    every = None if config.keep_every == "none" else config.keep_every
    sequences = None if config.keep_best is False else heldout_sequences
    ends = frozenset(start for start in stages.values() if start)
    return RetentionPolicy(config.keep, every, sequences, next(reversed(list(stages)), None), ends)


def unknown_best_warning(recipe: Recipe, begin: int = 0) -> str | None:
    """Return the warning, if so, that no checkpoint before the last can be the best: none is written where there is
    an evaluation. `begin`: the step after which the stage begins."""
    evaluation, checkpoint, last = recipe.evaluation, recipe.checkpoint, begin + recipe.train.steps
    if evaluation is None or checkpoint.keep_best is False:
        return None
    saves, both = checkpoint.every, math.lcm(evaluation.every, checkpoint.every)
    if not _any_multiple(saves, begin, last) or _any_multiple(both, begin, last):
        return None
    return (
        "checkpoint.keep_best: no checkpoint before the last one is at the step of an evaluation, so none can be kept "
        f"as the best; make one of checkpoint.every = {checkpoint.every} and evaluation.every = {evaluation.every} a "
        "multiple of the other"
    )


def _any_multiple(of: int, begin: int, last: int) -> bool:
    """Return whether a multiple of a number is after `begin` and before `last`."""
    return (begin // of + 1) * of < last


def best_text(best: tuple[Path, float] | None) -> str:
    """Return the line, or nothing, about the best checkpoint and its held-out loss."""
    return "" if best is None else f"\nBest held-out loss: {best[1]:.4f} nats per token, of {best[0]}"

"""LR schedules: warmup, then constant, cosine or WSD; pure functions of the step, so checkpoints hold no state."""

import math

from longctx.recipe.tables import LRScheduleConfig

FINAL = 0.1
"""Default factor at the last step."""


def lr_factor(config: LRScheduleConfig, step: int, steps: int) -> float:
    """Return the factor on the base learning rate for step `step` (from 1) of `steps`.

    Linear warmup from 0 over `warmup` steps; then constant, or cosine decay to `final` at the last step (Loshchilov &
    Hutter 2017), or constant followed by linear decay to `final` over the last `decay` steps (WSD, Hu et al. 2024).
    """
    if step <= config.warmup:
        return step / config.warmup
    if config.kind == "constant":
        return 1.0
    final = FINAL if config.final is None else config.final
    if config.kind == "cosine":
        progress = (step - config.warmup) / (steps - config.warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    assert config.decay is not None
    return 1 - (1 - final) * max(0.0, 1 - (steps - step) / config.decay)

"""Stages of a run: which one its latest checkpoint belongs to, and which one is trained next."""

from pathlib import Path

from longctx.checkpoint.trainer_state import TrainerState
from longctx.errors import UserError
from longctx.recipe import Recipe
from longctx.recipe.schema import Stage


def find_stage(
    recipe: Recipe, source: Path | None, state: TrainerState | None, only: str | None = None
) -> tuple[Stage, bool]:
    """Return the stage that a run trains next, and whether it begins with the checkpoint of the stage before.

    `source` and `state`: the checkpoint that the run resumes from; None if there is none. `only`: the stage that is to
    be trained; if it is complete, the stage that is returned is a later one. Raises UserError if the checkpoint is of
    no stage of the recipe, or a stage before `only` is not complete.
    """
    stages = recipe.stages
    current, begins = (stages[0], False) if state is None else _after(stages, source, state)
    if only is None:
        return current, begins
    wanted = recipe.find_stage(only)
    if wanted.number > current.number:
        done = 0 if state is None or begins else state.step - state.stage_start
        raise UserError(f"--stage {only}: {current} comes first, and is at step {done} of {current.recipe.train.steps}")
    return current, begins


def _after(stages: tuple[Stage, ...], source: Path | None, state: TrainerState) -> tuple[Stage, bool]:
    """Return the stage that follows a checkpoint, and whether it begins with it."""
    number = next((stage.number for stage in stages if stage.name == state.stage), None)
    if number is None:
        of = "of a run without stages" if state.stage is None else f"of the stage {state.stage!r}"
        has = ", ".join(stage.name for stage in stages if stage.name is not None)
        raise UserError(
            f"checkpoint {source} is {of}, and the recipe has {f'the stages {has}' if has else 'no stages'}: restore "
            "its [[stage]], or start a new run from these weights (train.init, --out)"
        )
    complete = state.step - state.stage_start >= stages[number].recipe.train.steps
    begins = complete and number + 1 < len(stages)
    return stages[number + begins], begins

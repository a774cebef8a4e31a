"""`longctx train`: launches the ranks that train a recipe, or joins a job as one rank."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.files import path_errors
from longctx.launch.job_environment import RankOfJob, find_job
from longctx.launch.job_rank import refuse_nproc, run_as_rank
from longctx.launch.local import run_ranks
from longctx.recipe import Recipe, check, load
from longctx.tracking.trackers import check_installed
from longctx.train.outcome import STOPPED, mark_stopped

_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)
_ADVICE = "--resume auto continues from the last complete checkpoint."


def train(
    source: str,
    overrides: Sequence[str] = (),
    *,
    tiny: bool = False,
    nproc: int | None = None,
    resume: str = "auto",
    out: Path | None = None,
    only_stage: str | None = None,
    only_check: bool = False,
) -> int:
    """Train the recipe `source`, or its `tiny` variant, with `overrides`, or only check whether it can be; return the
    exit status.

    In a job whose scheduler has started this process as a rank, it runs as that rank. Otherwise `nproc` ranks are
    launched on this machine, which may be one node of a job (`longctx.launch.job_environment`); None: one per GPU, or
    on a CPU as many as the recipe's axes need. `resume`: `auto`, `never`, or a checkpoint directory. `out`: the run
    directory; None: `runs/<name>`. `only_stage`: the stage of a curriculum to train; None: all that are left.

    Raises UserError, before any rank starts, if the recipe is invalid, cannot run on that many ranks, or asks for a
    tracker that is not installed.
    """
    recipe = load(source, overrides, tiny=tiny)
    if only_stage is not None:
        recipe.find_stage(only_stage)
    check_installed(recipe.logging)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"--resume {resume}: there is no such directory; give auto, never, or a checkpoint directory")
    out = out or Path("runs") / recipe.name
    job = find_job(nproc)
    if isinstance(job, RankOfJob):
        refuse_nproc(nproc, job)
        if only_check:
            return _check(recipe, out, resume, only_stage, job.size, shown=job.rank == 0)
        return _run_in_job(recipe, out, resume, only_stage, job)
    ranks = nproc or (job and job.ranks) or _default_ranks(recipe, start=not only_check)
    node = job if job is not None and job.nodes > 1 else None
    if only_check:
        nodes, shown = (1, True) if node is None else (node.nodes, node.node == 0)
        return _check(recipe, out, resume, only_stage, ranks * nodes, shown=shown)
    check(recipe, ranks * (1 if node is None else node.nodes))
    arguments = {
        "recipe": recipe.model_dump(),
        "out": str(out),
        "resume": resume,
        "command": sys.orig_argv,
        "only_stage": only_stage,
    }
    entry, title = "longctx.launch.train:run_rank", f"{recipe.name}, in {out}"
    status = run_ranks(entry, arguments, ranks=ranks, logs=out / "logs", node=node, title=title, advice=_ADVICE)
    if node is None and status in _STOPPED and not (out / STOPPED).exists():
        mark_stopped(out, "before it could save")
    return status


def _check(recipe: Recipe, out: Path, resume: str, only_stage: str | None, ranks: int, *, shown: bool) -> int:
    # Imported here: torch is imported by ranks only, otherwise.
    from longctx.launch.check import check_run

    return check_run(recipe, out, resume, ranks, only_stage, shown=shown)


def run_rank(recipe: dict[str, Any], out: str, resume: str, command: list[str], only_stage: str | None) -> int:
    """Run the trainer on a local rank, with the recipe that the parent has loaded; return the rank's exit status.

    `command`: that of the parent, as arguments.
    """
    from longctx.train.trainer import train

    with path_errors():
        whole = Recipe.model_validate_json(json.dumps(recipe))
        return train(whole, out=Path(out), resume=resume, command=command, only_stage=only_stage)


def _run_in_job(recipe: Recipe, out: Path, resume: str, only_stage: str | None, job: RankOfJob) -> int:
    """Run the trainer as a rank that a scheduler has started; return its exit status."""
    from longctx.train.trainer import train

    check(recipe, job.size)
    return run_as_rank(job, partial(train, recipe, out=out, resume=resume, only_stage=only_stage), _ADVICE)


def _default_ranks(recipe: Recipe, *, start: bool) -> int:
    """Return one rank per GPU that the recipe may use; on a CPU, as many as its axes need.

    Raises UserError if they are to `start` and there are not so many cores.
    """
    import torch

    gpus = 0 if recipe.train.device == "cpu" else torch.cuda.device_count()
    if gpus:
        return gpus
    needed, cores = recipe.fewest_ranks, len(os.sched_getaffinity(0))
    if start and needed > max(cores, 1):
        raise UserError(
            f"the axes of [parallel] need {needed} ranks, and this machine has {cores} CPU cores and no GPU that the "
            f"recipe may use: give --nproc {needed} to start them all the same, or smaller axes, such as parallel.cp=1"
        )
    return needed

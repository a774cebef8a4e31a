"""`longctx train`: from a recipe to ranks that train it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.launch.local import run_ranks
from longctx.recipe import Recipe, check, load

_ADVICE = "--resume auto continues from the last complete checkpoint."


def train(
    source: str,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    resume: str = "auto",
    out: Path | None = None,
) -> int:
    """Train the recipe `source` with its overrides; the exit status.

    Inside a job that torchrun or a cluster started this process is one rank of it. Elsewhere `nproc` ranks are started
    on this machine; None: one for each GPU, or one on the CPU. `resume`: `auto`, `never`, or a checkpoint's directory.
    `out`: the run's directory; None: `runs/<name>`.

    Raises UserError, before any rank starts, where the recipe is wrong or cannot run on that many ranks.
    """
    recipe = load(source, overrides)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(
            f"--resume {resume}: there is no such directory; write auto, never, or a checkpoint's directory"
        )
    out = out or Path("runs") / recipe.name
    ranks = job_size()
    if ranks is not None:
        if nproc is not None:
            raise UserError(
                f"--nproc {nproc}: this process is already one rank of {ranks}, by RANK and WORLD_SIZE in its "
                "environment; leave --nproc out"
            )
        check(recipe, ranks)
        _run_in_job(recipe, out, resume)
        return 0
    ranks = nproc or _default_ranks(recipe.train.device)
    check(recipe, ranks)
    arguments = {"recipe": recipe.model_dump(), "out": str(out), "resume": resume}
    return run_ranks("longctx.launch.train:run_rank", arguments, ranks=ranks, logs=out / "logs", advice=_ADVICE)


def run_rank(recipe: dict[str, Any], out: str, resume: str) -> None:
    """What each local rank runs: the trainer, with the recipe that the parent has read."""
    from longctx.train.trainer import train

    train(Recipe.model_validate_json(json.dumps(recipe)), out=Path(out), resume=resume)


def job_size() -> int | None:
    """The number of ranks of the job that this process is a rank of already; None where it is not in one.

    Raises UserError where the environment tells only half.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"RANK and WORLD_SIZE are set, as for one rank of a job, but {name} is not: set it to where rank 0 "
                "listens, or unset RANK and WORLD_SIZE to start ranks on this machine"
            )
    return int(os.environ["WORLD_SIZE"])


def _run_in_job(recipe: Recipe, out: Path, resume: str) -> None:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from longctx.train.trainer import train

    handler = get_error_handler()
    handler.initialize()
    try:
        train(recipe, out=out, resume=resume)
    except UserError:
        raise
    except Exception as error:
        # torchrun reads the first traceback from here.
        handler.record_exception(error)
        raise


def _default_ranks(device: str) -> int:
    """One rank for each GPU that the recipe may use, else one."""
    import torch

    return 1 if device == "cpu" else torch.cuda.device_count() or 1

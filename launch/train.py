"""`longctx train`: launches the ranks that train a recipe, or joins a job as one rank."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.files import path_errors
from longctx.launch.local import run_ranks
from longctx.recipe import Recipe, check, load

_MAX_PORT = 2**16 - 1
_ADVICE = "--resume auto continues from the last complete checkpoint."


def train(
    source: str,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    resume: str = "auto",
    out: Path | None = None,
) -> int:
    """Train the recipe `source` with `overrides`; return the exit status.

    In a job started by torchrun or a cluster, this process runs as one rank. Otherwise `nproc` ranks are launched on
    this machine; None: one per GPU, or one on the CPU. `resume`: `auto`, `never`, or a checkpoint directory. `out`: the
    run directory; None: `runs/<name>`.

    Raises UserError, before any rank starts, if the recipe is invalid or cannot run on that many ranks.
    """
    recipe = load(source, overrides)
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"--resume {resume}: there is no such directory; give auto, never, or a checkpoint directory")
    out = out or Path("runs") / recipe.name
    ranks = job_size()
    if ranks is not None:
        if nproc is not None:
            raise UserError(
                f"--nproc {nproc}: this process is already one rank of {ranks} (RANK and WORLD_SIZE are set); omit "
                "--nproc"
            )
        check(recipe, ranks)
        return _run_in_job(recipe, out, resume)
    ranks = nproc or _default_ranks(recipe.train.device)
    check(recipe, ranks)
    arguments = {"recipe": recipe.model_dump(), "out": str(out), "resume": resume}
    return run_ranks("longctx.launch.train:run_rank", arguments, ranks=ranks, logs=out / "logs", advice=_ADVICE)


def run_rank(recipe: dict[str, Any], out: str, resume: str) -> int:
    """Run the trainer on a local rank, with the recipe that the parent has loaded; return the rank's exit status."""
    from longctx.train.trainer import train

    with path_errors():
        return train(Recipe.model_validate_json(json.dumps(recipe)), out=Path(out), resume=resume)


def job_size() -> int | None:
    """Return the number of ranks of the job that this process belongs to; None outside a job.

    Raises UserError if the environment variables are incomplete or no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"RANK and WORLD_SIZE are set, but {name} is not: set MASTER_ADDR and MASTER_PORT to the address and "
                "port of rank 0, or unset RANK and WORLD_SIZE to launch ranks on this machine"
            )
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size:
        raise UserError(f"RANK {rank}: expected less than WORLD_SIZE, {size}; each rank needs its own")
    if port > _MAX_PORT:
        raise UserError(f"MASTER_PORT {port}: expected at most {_MAX_PORT}, the port of rank 0")
    return size


def _number(name: str) -> int:
    value = os.environ[name]
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"{name} {value!r}: expected a number; torchrun and clusters set this environment variable")
    return int(value)


def _run_in_job(recipe: Recipe, out: Path, resume: str) -> int:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from longctx.train.trainer import train

    handler = get_error_handler()
    handler.initialize()
    try:
        with path_errors():
            return train(recipe, out=out, resume=resume)
    except UserError:
        raise
    except Exception as error:
        # torchrun reads the first traceback from here.
        handler.record_exception(error)
        raise


def _default_ranks(device: str) -> int:
    """Return one rank per GPU that the recipe may use, else 1."""
    import torch

    return 1 if device == "cpu" else torch.cuda.device_count() or 1

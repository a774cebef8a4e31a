"""Resuming from a copy of a checkpoint: the copies of a run at its start, and the latest, if it is not in `out`."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from longctx.checkpoint.copies import CheckpointCopies
from longctx.checkpoint.read import TRAINER, list_checkpoints, name_of, step_of
from longctx.errors import UserError
from longctx.files import sync, writing
from longctx.parallel.rank_errors import raise_on_all_ranks

CLAIM = "copies.json"
"""The file in a run's directory with the id by which the copies are its own."""


def open_copies(url: str, out: Path, resume: str, say: Callable[[str], None]) -> CheckpointCopies:
    """Open the copies of a run's checkpoints, and download the latest if `resume` is `auto` and `out` has none as late.

    `say` is called on rank 0 before a download. Collective. Raises UserError, on every rank, if the copies are of
    another run, or the store fails.
    """
    step: list[int | None] = [None]
    with raise_on_all_ranks():
        copies = CheckpointCopies(url)
        if dist.get_rank() == 0:
            step = [_claim(copies, out, resume)]
    dist.broadcast_object_list(step, src=0)
    if step[0] is not None:
        if dist.get_rank() == 0:
            say(f"Downloading {copies.url}/{name_of(step[0])}.")
        _download(copies, step[0], out / "checkpoints")
    return copies


def _claim(copies: CheckpointCopies, out: Path, resume: str) -> int | None:
    """Make the copies those of the run in `out`; return the step of the one to download, if any. On rank 0.

    A directory without checkpoints takes them over, with an id of its own: the run that they were of may still be
    alive elsewhere, and does not mix its checkpoints with these then.
    """
    step, own = find_copy(copies, out, resume)
    if own is None:
        own = uuid.uuid4().hex
        with writing(out / CLAIM):
            out.mkdir(parents=True, exist_ok=True)
            (out / CLAIM).write_text(json.dumps({"url": copies.url, "run": own}), encoding="utf-8")
    copies.claim(own)
    return step


def find_copy(copies: CheckpointCopies, out: Path, resume: str) -> tuple[int | None, str | None]:
    """Return the step of the copy that a start downloads, if any, and the id by which the copies are its own, if so.

    Reads only. Raises UserError if the copies are of another run, or the store fails.
    """
    local = list_checkpoints(out / "checkpoints")
    steps, owner, own = copies.steps(), copies.owner(), _own_id(copies, out)
    what = f"checkpoint.copy_to: {copies.url} has copies of"
    if steps and resume == "never":
        raise UserError(
            f"{what} an earlier run's checkpoints, the latest {name_of(steps[-1])}: resume from it with --resume auto, "
            "or choose another URL"
        )
    if own is None or owner != own:
        if steps and (local or resume != "auto"):
            raise UserError(
                f"{what} another run's checkpoints than that in {out}, the latest {name_of(steps[-1])}: choose another "
                "URL, or start in a directory without checkpoints to resume from that one"
            )
        own = None
    latest = step_of(local[-1]) if local else -1
    return (steps[-1] if steps and resume == "auto" and steps[-1] > latest else None), own


def _own_id(copies: CheckpointCopies, out: Path) -> str | None:
    """Return the id by which the run in `out` has claimed the copies; None if it has not."""
    try:
        stored = json.loads((out / CLAIM).read_text(encoding="utf-8"))
        return str(stored["run"]) if stored["url"] == copies.url else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / CLAIM} cannot be read: {error}. Remove it to start without copies") from error


def _download(copies: CheckpointCopies, step: int, folder: Path) -> None:
    """Download a copy into `folder`, its files shared by the ranks; complete or absent, like a checkpoint."""
    final, rank = folder / name_of(step), dist.get_rank()
    draft = final.with_name(f"{final.name}.partial")
    with raise_on_all_ranks(), writing(draft):
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
    with raise_on_all_ranks():
        names = sorted(copies.listing(step)["files"])
        draft.mkdir(exist_ok=True, parents=True)  # another machine may not see it yet
        for name in names[rank :: dist.get_world_size()]:
            copies.download(step, [name], draft)
            sync(draft / name)
    with raise_on_all_ranks(), writing(draft):
        if rank == 0:
            missing = [name for name in names if not (draft / name).is_file()]
            if missing:
                raise UserError(
                    f"rank 0 does not see {', '.join(missing)}, which other ranks downloaded: the run's directory "
                    "(--out) must be on a file system shared by all machines"
                )
            copies.download(step, [TRAINER], draft)
            sync(draft / TRAINER)
            draft.rename(final)
            sync(folder)

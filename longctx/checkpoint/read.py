"""Reading a run's checkpoints: which there are, whether they are intact and of this model, their states and tensors."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from longctx.checkpoint.checksums import find_changed, stored_checksums, unseal
from longctx.checkpoint.compare_models import differences
from longctx.checkpoint.restricted import METADATA
from longctx.checkpoint.retention import HeldOut
from longctx.checkpoint.storage import find_damage, read_tensors
from longctx.checkpoint.trainer_state import TrainerState, parse_state
from longctx.errors import UserError

_NAME = re.compile(r"step-(\d{8})")
TRAINER = "trainer.json"
"""The listing file of a checkpoint."""
RESUME = "with --resume PATH"
"""How a checkpoint to resume from is named on the command line, for error messages."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if parse_name(path.name) is not None and path.is_dir())


def name_of(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def parse_name(name: str) -> int | None:
    """Return the step of a checkpoint by the name of its folder; None if it is not the name of one."""
    named = _NAME.fullmatch(name)
    return None if named is None else int(named[1])


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, of those that `list_checkpoints` returns, by its name."""
    step = parse_name(path.name)
    assert step is not None
    return step


def read_listing(path: Path, how: str = RESUME) -> dict[str, Any]:
    """Read the listing of a checkpoint. Raises UserError if there is none, or it is damaged."""
    if (path / TRAINER).exists() and not (path / TRAINER).is_file():
        raise UserError(_unreadable(path, "it is not a file", how))  # reading a pipe would wait for ever
    try:
        return unseal((path / TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(_unreadable(path, error, how)) from error


def heldout_losses(steps: Iterable[int], read: Callable[[int], Mapping[str, Any]]) -> dict[int, HeldOut]:
    """Return the held-out losses of checkpoints by step; those without one, or with a damaged listing, are left out.

    `read` reads the listing of a step's checkpoint.
    """
    losses = {}
    for step in steps:
        with suppress(UserError, ValueError, KeyError, TypeError):
            loss = parse_state(read(step)["state"]).heldout_loss
            if loss is not None:
                losses[step] = loss
    return losses


def read_state(path: Path, how: str = RESUME) -> TrainerState:
    """Read the state of a checkpoint and check its files; `how` is how a checkpoint is named on the command line.

    Raises UserError if `path` is not a checkpoint, or a file is missing or truncated.
    """
    content = read_listing(path, how)
    stored = content.get("state")
    unknown = sorted({*stored} - {each.name for each in fields(TrainerState)}) if isinstance(stored, dict) else []
    if unknown:
        raise UserError(
            f"checkpoint {path} was written by a newer version of longctx: this one does not know "
            f"{', '.join(unknown)}. Read it with that version. {suggest_alternative(path, how)}"
        )
    try:
        state, files = parse_state(content["state"]), dict(content["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(_unreadable(path, error, how)) from error
    damage = _find_wrong(path, state, files) or find_damage(path, files)
    if damage is not None:
        raise UserError(f"checkpoint {path} is damaged: {damage}. {suggest_alternative(path, how)}")
    return state


def read_checksums(path: Path, how: str = RESUME) -> dict[str, str]:
    """Read the checksum of each file of a checkpoint; none where an earlier version of longctx wrote it.

    Raises UserError if `path` is not a checkpoint.
    """
    listing = read_listing(path, how)
    try:
        return stored_checksums(listing)
    except UserError as error:
        raise UserError(_unreadable(path, error, how)) from error


def verify_content(path: Path, how: str = RESUME) -> bool:
    """Compare the content of a checkpoint's files with their checksums; return whether it has any.

    A collective call if there is a process group, whose ranks share the files. Raises UserError, on every rank, if a
    file has changed.
    """
    checksums = read_checksums(path, how)
    changed = find_changed(path, checksums)
    if changed is not None:
        raise UserError(f"checkpoint {path} is damaged: {changed}. {suggest_alternative(path, how)}")
    return bool(checksums)


def _unreadable(path: Path, reason: object, how: str) -> str:
    advice = suggest_alternative(path, how)
    return f"{path} is not a checkpoint, or it is damaged: {TRAINER} cannot be read ({reason}). {advice}"


def _find_wrong(path: Path, state: TrainerState, files: Mapping[str, Any]) -> str | None:
    """Describe what is wrong with a listing, whatever lies beside it; None if nothing is."""
    for name in ("step", "sequences", "tokens"):
        value = getattr(state, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"{TRAINER} has {name} {value!r}, expected a number from 0"
    named = parse_name(path.name)
    if named not in (state.step, None):
        return f"{TRAINER} is of step {state.step}, and the folder of step {named}"
    if METADATA not in files:
        return f"{TRAINER} does not list {METADATA}"
    if not all(Path(name).name == name and isinstance(size, int) for name, size in files.items()):
        return f"{TRAINER} lists what is not a file's name and size"
    return None


def suggest_alternative(path: Path, how: str) -> str:
    """Return advice, as a sentence, for a checkpoint `path` that cannot be used: the other checkpoints near it."""
    folders = (path.parent, path, path / "checkpoints")  # the last two: if `path` is a run's directory
    others = [str(other) for folder in folders for other in list_checkpoints(folder) if other != path]
    if others:
        return f"Use another checkpoint {how} (available: {', '.join(others)})"
    restart = ": start a new run in another directory (--out)" if how == RESUME else ""
    return f"There is no other checkpoint beside it{restart}"


def check_format(path: Path, state: TrainerState, wanted: str, advice: str) -> None:
    """Raise UserError if the checkpoint's tensors are not in the format `wanted`."""
    if state.format != wanted:
        raise UserError(f"checkpoint {path} has tensors in the format of engine = {state.format!r}. {advice}")


def load_tensors(path: Path, tensors: dict[str, Any], how: str = RESUME) -> None:
    """Read a checkpoint into `tensors`, in place, from any number of ranks to any other.

    A collective call, or a call of one process without a process group. Raises UserError if it cannot be read.
    """
    try:
        read_tensors(path, tensors)
    except UserError as error:
        raise UserError(f"checkpoint {error}. {suggest_alternative(path, how)}") from error


_ANOTHER_RUN = "Train this model in another directory (--out), or start a new run (--resume never --out …)"


def check_same_model(path: Path, state: TrainerState, model: dict[str, Any], advice: str = _ANOTHER_RUN) -> None:
    """Raise UserError, naming every difference, if the checkpoint is of another model than `model`."""
    found = differences(state.model, model)
    if found:
        raise UserError(f"checkpoint {path} is of another model: {'; '.join(found)}. {advice}")

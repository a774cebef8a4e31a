"""`longctx checkpoint`: compare the files of checkpoints and exports with their checksums."""

import sys
from pathlib import Path

from longctx.checkpoint.checksums import CHECKSUMS, verify_checksums
from longctx.checkpoint.read import TRAINER, list_checkpoints, read_state, verify_content
from longctx.checkpoint.weights import CONVERTED, find_weights
from longctx.errors import UserError
from longctx.printable import printable

_HOW = "as PATH"


def run_verify(path: Path) -> int:
    """Compare what `path` has with its checksums; return the exit status, 1 if anything is damaged or has none.

    `path`: a checkpoint, a run's directory (all its checkpoints), or a folder that `longctx convert` wrote. Raises
    UserError if it is none of them.
    """
    folders = [path] if (path / TRAINER).is_file() else list_checkpoints(path / "checkpoints")
    folders = folders or [path]
    status = 0
    for folder in folders:
        try:
            verified = _verify(folder)
        except UserError as error:
            if len(folders) == 1:
                raise
            _report(str(error))
            status = 1
            continue
        _report(f"{folder}: {'intact' if verified else 'has no checksums, an earlier version of longctx wrote it'}")
        status = status if verified else 1
    return status


def _report(text: str) -> None:
    sys.stdout.write(f"{printable(text)}\n")


def _verify(folder: Path) -> bool:
    """Return whether a folder has checksums. Raises UserError if it is damaged, or has neither these nor a listing."""
    if (folder / TRAINER).is_file():
        read_state(folder, _HOW)
        return verify_content(folder, _HOW)
    if (folder / CONVERTED).is_file():
        weights = find_weights(folder, _HOW)
        weights.verify_content()
        return bool(weights.checksums)
    if verify_checksums(folder):
        return True
    raise UserError(
        f"{folder} is not a checkpoint, a run with checkpoints, or the output of longctx convert: it has no {TRAINER}, "
        f"{CONVERTED} or {CHECKSUMS}"
    )

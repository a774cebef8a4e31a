"""Checkpoints that are complete or absent, written while training goes on.

A save copies this rank's state to CPU memory on the caller's thread, and one background thread writes the copy with
`torch.distributed.checkpoint` over a gloo group of its own, into a folder beside its final name; when every rank has
written, rank 0 renames it. A run that is killed at any moment leaves a folder named `….partial`, which nobody reads and
the next save removes.

`dcp.async_save` is not used: see docs/checkpoints.md for what it does at interpreter exit.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from longctx.checkpoint.storage import Writer, causes, damage, read_tensors, write_listing
from longctx.errors import UserError
from longctx.files import sync

_NAME = re.compile(r"step-(\d{8})")
TRAINER = "trainer.json"
"""What makes a folder a checkpoint."""
RESUME = "with --resume PATH"
"""How a checkpoint is given to go on from, in words."""
_AFTER_FAILURE = "Earlier checkpoints are as they were; mend this, and go on from the newest with --resume auto"


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint says beside the tensors."""

    step: int
    sequences: int
    """Sequences read so far, over all ranks."""
    tokens: int
    """Tokens trained on so far."""
    data: str
    """Fingerprint of the stream of sequences: corpus, order and sequence length."""
    model: dict[str, Any]
    """The model's configuration, with the size of its vocabulary."""
    speeds: dict[str, float] | None = None
    """What the schedules of attention were chosen with, so that a resumed run chooses them again; None where nothing
    was measured."""
    format: str = "torch"
    """Whose names and shapes the tensors have: the built-in model's, or `megatron`, Megatron-Core's."""


class Checkpointer:
    """The checkpoints of one run. Every rank makes one, and every rank calls every method."""

    def __init__(self, folder: Path, keep: int, timeout: float) -> None:
        """`folder` holds `step-<8 digits>`; the newest `keep` stay; `timeout` seconds for a rank that is waited for."""
        self.folder, self.keep = folder, keep
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc="checkpoint")
        # Plain copies into buffers that the next save uses again: no pinned or shared memory, no thread of its own.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, tensors: dict[str, Any], state: TrainerState) -> None:
        """Begin to write `step-<state.step>`; the tensors may change when this returns.

        Waits for the save before, and raises what became of it (`wait`).
        """
        self.wait()
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        self._pending = self._thread.submit(self._write, partial(self._write_tensors, staged), state)

    def save_with(self, write: Callable[[Path], None], state: TrainerState) -> None:
        """Write `step-<state.step>` by another framework's means, on the caller's thread.

        `write` puts all ranks' files into a folder that is there, in a format of torch.distributed.checkpoint. Raises
        UserError, on every rank, where they cannot be written or published.
        """
        self.wait()
        self._write(write, state)

    def wait(self) -> None:
        """Wait for the save under way. Raises UserError, on every rank, where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)
            self._stager.close()

    def _on_rank_zero(self, what: str, action: Callable[[], None]) -> None:
        """Do it on rank 0, and learn on every rank whether it went well."""
        outcome: list[str | None] = [None]
        if dist.get_rank(self._group) == 0:
            try:
                action()
            except (OSError, UserError) as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise UserError(f"{what}: {outcome[0]}. {_AFTER_FAILURE}")

    def _write_tensors(self, staged: dict[str, Any], folder: Path) -> None:
        dcp.save(staged, storage_writer=Writer(folder), process_group=self._group)

    def _write(self, write: Callable[[Path], None], state: TrainerState) -> None:
        final = self.folder / f"step-{state.step:08d}"
        draft = final.with_name(final.name + ".partial")

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left)
            draft.mkdir()

        def publish() -> None:
            seen = {file.name for file in draft.iterdir()}
            written = dcp.FileSystemReader(draft).read_metadata()
            unseen = sorted({part.relative_path for part in written.storage_data.values()} - seen)
            if unseen:
                raise UserError(
                    f"rank 0 does not see {', '.join(unseen)}, which other ranks wrote: the run's directory (--out) "
                    "has to be on a file system that all machines share"
                )
            write_listing(draft, TRAINER, {"state": asdict(state)})
            if final.exists():
                _remove(final)
            draft.rename(final)
            sync(self.folder)
            there = list_checkpoints(self.folder)
            place = there.index(final)
            # Later ones are of an attempt that was given up when the run went back to an earlier checkpoint; kept, the
            # next start would take them for the newest.
            for path in (*there[place + 1 :], *there[: max(0, place + 1 - self.keep)]):
                _remove(path)

        what = f"checkpoint {final} could not be written"
        self._on_rank_zero(what, prepare)
        said: str | None = None
        try:
            write(draft)
        except CheckpointException as error:
            said = causes(error)
        except OSError as error:
            said = f"rank {dist.get_rank(self._group)}: {error}"
        each: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(each, said, group=self._group)
        if any(words is not None for words in each):
            # Who waited for the one that failed has nothing to say.
            raise UserError(f"{what}: {'; '.join(dict.fromkeys(words for words in each if words))}. {_AFTER_FAILURE}")
        self._on_rank_zero(what, publish)


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that what is left of it after a crash is not taken for one."""
    doomed = path.with_name(f"{path.name}.removed.partial")
    path.rename(doomed)
    shutil.rmtree(doomed)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def read_state(path: Path, how: str = RESUME) -> TrainerState:
    """What a checkpoint says beside its tensors; `how` says the way to give another one.

    Raises UserError where it is no checkpoint or a file of it is missing or cut short.
    """
    try:
        content = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        state, files = TrainerState(**content["state"]), dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no checkpoint, or a damaged one: {TRAINER} cannot be read ({error}). {others(path, how)}"
        ) from error
    damaged = damage(path, files)
    if damaged is not None:
        raise UserError(f"checkpoint {path} is damaged: {damaged}. {others(path, how)}")
    return state


def others(path: Path, how: str) -> str:
    """What to do where the checkpoint `path` cannot be used."""
    folders = (path.parent, path, path / "checkpoints")  # the last two: where a run's own directory was given
    found = [str(other) for folder in folders for other in list_checkpoints(folder) if other != path]
    if found:
        return f"Give another one {how} (there: {', '.join(found)})"
    anew = ": begin anew in another directory (--out)" if how == RESUME else ""
    return f"There is no other one beside it{anew}"


def check_format(path: Path, state: TrainerState, wanted: str, advice: str) -> None:
    """Raise UserError where the checkpoint's tensors are not those of the format that is wanted."""
    if state.format != wanted:
        raise UserError(f"checkpoint {path} has the tensors of engine = {state.format!r}. {advice}")


def load_tensors(path: Path, tensors: dict[str, Any], how: str = RESUME) -> None:
    """Read a checkpoint into `tensors`, in place, whatever the number of ranks that wrote it.

    On every rank together, or in one process without a process group. Raises UserError where it cannot be read.
    """
    try:
        read_tensors(path, tensors)
    except UserError as error:
        raise UserError(f"checkpoint {error}. {others(path, how)}") from error


_ANOTHER_RUN = "Train this one into another directory (--out), or begin anew (--resume never --out …)"


def check_same_model(path: Path, state: TrainerState, model: dict[str, Any], advice: str = _ANOTHER_RUN) -> None:
    """Raise UserError, naming every difference, where the checkpoint is of another model than `model`."""
    found = differences(state.model, model)
    if found:
        raise UserError(f"checkpoint {path} is of another model: {'; '.join(found)}. {advice}")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In which keys two models' configurations differ, in words."""
    return [
        f"{key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]

"""Asynchronous checkpoints: atomic, sharded, written while training continues.

A save copies this rank's state to CPU memory on the caller's thread. A background thread writes the copy with
`torch.distributed.checkpoint`, over a gloo group of its own, into a folder with a temporary name; when every rank has
written, rank 0 renames it. A run that is killed at any moment leaves a folder `….partial`, which is never read and is
removed by the next save.

`dcp.async_save` is not used; docs/checkpoints.md explains why (it can abort at interpreter exit).
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from longctx.checkpoint.checksums import checksum, written_by
from longctx.checkpoint.copies import CheckpointCopies
from longctx.checkpoint.read import (
    TRAINER,
    heldout_losses,
    list_checkpoints,
    name_of,
    read_listing,
    step_of,
)
from longctx.checkpoint.restricted import read_metadata
from longctx.checkpoint.retention import HeldOut, RetentionPolicy
from longctx.checkpoint.storage import Writer, content_of, describe_failures, write_listing
from longctx.checkpoint.trainer_state import TrainerState
from longctx.errors import UserError
from longctx.files import sync

_T = TypeVar("_T")
_STAGES_ONCE = Version(torch.__version__).release < (2, 13)
"""Whether torch's stager copies one state and is of no use after it: torch 2.11 and 2.12 empty its tables then."""
_AFTER_FAILURE = "Earlier checkpoints are unchanged: fix the cause and resume from the latest with --resume auto"
_NOT_COPIED = "The checkpoint itself is complete. The next one will be copied, or this one at the next start"


class Checkpointer:
    """Saves the checkpoints of one run. Constructor and methods are collective: every rank calls them."""

    def __init__(
        self,
        folder: Path,
        retention: RetentionPolicy,
        timeout: float,
        check: Callable[[], None] = lambda: None,
        copies: CheckpointCopies | None = None,
    ) -> None:
        """Save to `folder/step-<8 digits>`, and copy to `copies`; wait at most `timeout` seconds for a rank.

        `retention`: which checkpoints are kept. A save during a spike removes no earlier one: until the loss is back at
        its usual level, the parameters may be worse than before. `check` is called on rank 0 before
        anything in `folder` changes, and raises UserError if nothing may.
        """
        self.folder, self._retention, self._check, self._copies = folder, retention, check, copies
        self.not_copied: str | None = None
        """Why the last checkpoint was not copied; None if it was, or if there are no copies."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc="checkpoint")
        self._stagers = [new_stager()]
        """Copies of this rank's tensors; those that no pending save uses are free."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[tuple[Future[None], DefaultStager | None]] = []
        """Saves in progress, oldest first."""

    def save(self, tensors: dict[str, Any], state: TrainerState) -> None:
        """Start writing `step-<state.step>` in the background; the tensors may change once this returns.

        Does not wait for the save before, which takes a second copy of the tensors if that is still being written; does
        wait for the one before that. Raises the error of a save that has ended (see `wait`).
        """
        self._wait_for(max(self._count_finished(), len(self._pending) - 1))
        stager = self._free_stager()
        staged = stager.stage(tensors)
        assert isinstance(staged, dict)
        write = partial(self._write_tensors, staged)
        self._pending.append((self._thread.submit(self._write, write, state), stager))

    def save_with(self, write: Callable[[Path], None], state: TrainerState) -> None:
        """Write `step-<state.step>` with another framework, on the caller's thread.

        `write` writes the files of all ranks into an existing folder, in a torch.distributed.checkpoint format. Raises
        UserError, on every rank, if the checkpoint cannot be written or renamed.
        """
        self.wait()
        self._write(write, state)

    def copy_missing(self, checkpoint: Path, state: TrainerState) -> None:
        """Start copying the checkpoint that the run resumes from, if it is of `folder` and its copy is not complete."""
        if self._copies is None or checkpoint.resolve().parent != self.folder.resolve():
            return
        self._pending.append((self._thread.submit(self._copy_if_missing, checkpoint, state), None))

    def wait(self) -> None:
        """Wait for the saves in progress. Raises UserError, on every rank, if one failed: the error of the first."""
        self._wait_for(len(self._pending))

    def _wait_for(self, count: int) -> None:
        """Wait for the `count` oldest saves in progress."""
        ended, self._pending = self._pending[:count], self._pending[count:]
        wait([future for future, _ in ended])
        for future, _ in ended:
            future.result()

    def _count_finished(self) -> int:
        """Return how many saves in progress every rank has finished: the same number on all ranks."""
        if not self._pending:
            return 0
        finished = torch.tensor(sum(future.done() for future, _ in self._pending))
        dist.all_reduce(finished, dist.ReduceOp.MIN)
        return int(finished)

    def _free_stager(self) -> DefaultStager:
        used = [stager for _, stager in self._pending if stager is not None]
        free = [stager for stager in self._stagers if stager not in used]
        if free and not _STAGES_ONCE:
            return free[0]
        for stager in free:
            stager.close()
        self._stagers = [*used, new_stager()]
        return self._stagers[-1]

    def close(self) -> None:
        """Wait for the saves in progress and stop the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=True)
            for stager in self._stagers:
                stager.close()

    def _on_rank_zero(self, what: str, action: Callable[[], None], advice: str = _AFTER_FAILURE) -> None:
        """Run `action` on rank 0; raise its error, after `what` and with `advice`, on every rank."""
        outcome: list[str | None] = [None]
        if dist.get_rank(self._group) == 0:
            try:
                action()
            except (OSError, UserError) as error:
                outcome = [str(error)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise UserError(f"{what}: {outcome[0]}. {advice}")

    def _write_tensors(self, staged: dict[str, Any], folder: Path) -> None:
        dcp.save(staged, storage_writer=Writer(folder), process_group=self._group)

    def _write(self, write: Callable[[Path], None], state: TrainerState) -> None:
        final = self.folder / name_of(state.step)
        draft = final.with_name(final.name + ".partial")

        def prepare() -> None:
            self._check()
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover)
            draft.mkdir()

        def publish(checksums: dict[str, str]) -> None:
            visible = {file.name for file in draft.iterdir()}
            metadata = read_metadata(draft)
            invisible = sorted({shard.relative_path for shard in metadata.storage_data.values()} - visible)
            if invisible:
                raise UserError(
                    f"rank 0 does not see {', '.join(invisible)}, which other ranks wrote: the run's directory (--out) "
                    "must be on a file system shared by all machines"
                )
            write_listing(draft, TRAINER, {"state": asdict(state)}, checksums)
            self._check()
            if final.exists():
                _remove(final)
            draft.rename(final)
            sync(self.folder)
            checkpoints = list_checkpoints(self.folder)
            index = checkpoints.index(final)
            # Later checkpoints are from before the run went back to an earlier one; if they were kept, the next start
            # would resume from them.
            surplus = [] if state.spikes.in_a_row else self._surplus(checkpoints[: index + 1])
            for path in (*checkpoints[index + 1 :], *surplus):
                _remove(path)

        what = f"checkpoint {final} could not be written"
        self._on_rank_zero(what, prepare)
        self._on_all_ranks(what, partial(write, draft))
        checksums = self._on_all_ranks(what, partial(self._checksums, draft))
        with self._copy(final, state):
            self._on_rank_zero(what, partial(publish, dict(chain.from_iterable(each.items() for each in checksums))))

    def _copy_if_missing(self, checkpoint: Path, state: TrainerState) -> None:
        copies = self._copies
        assert copies is not None
        try:
            is_first = dist.get_rank(self._group) == 0
            steps = self._on_all_ranks(_uncopied(checkpoint), lambda: copies.steps() if is_first else [], _NOT_COPIED)
        except UserError as error:
            self.not_copied = str(error)
            return
        if state.step not in steps[0]:
            with self._copy(checkpoint, state):
                pass

    @contextmanager
    def _copy(self, checkpoint: Path, state: TrainerState) -> Iterator[None]:
        """Copy the checkpoint that the block publishes, if there are copies.

        Those of later steps are removed before: if the run died in between, the next start would resume from them. A
        copy that fails leaves a message in `not_copied`: training does not depend on it.
        """
        copies, what = self._copies, _uncopied(checkpoint)
        if copies is None:
            yield
            return

        def publish() -> None:
            copies.publish(checkpoint)
            if not state.spikes.in_a_row:
                copies.retain(self._retention)

        def upload() -> None:
            copies.upload(checkpoint, self._own_files(checkpoint, besides=TRAINER))

        self.not_copied = None
        try:
            self._on_rank_zero(what, partial(copies.begin, state.step), _NOT_COPIED)
        except UserError as error:
            self.not_copied = str(error)
        yield
        if self.not_copied is None:
            try:
                self._on_all_ranks(what, upload, _NOT_COPIED)
                self._on_rank_zero(what, publish, _NOT_COPIED)
            except UserError as error:
                self.not_copied = str(error)

    def _surplus(self, checkpoints: Sequence[Path]) -> list[Path]:
        by_step = {step_of(path): path for path in checkpoints}
        return [by_step[step] for step in self._retention.surplus(list(by_step), self._losses(checkpoints))]

    def best(self) -> tuple[Path, float] | None:
        """Return the checkpoint with the lowest held-out loss and that loss, in nats per token; None if none is known,
        or the best is not kept. Not collective."""
        checkpoints = list_checkpoints(self.folder)
        losses = self._losses(checkpoints)
        step = self._retention.best(losses)
        return None if step is None else (self.folder / name_of(step), losses[step].loss)

    def _losses(self, checkpoints: Sequence[Path]) -> dict[int, HeldOut]:
        """Return the held-out losses by step; reads nothing if the best checkpoint is not kept."""
        by_step = {step_of(path): path for path in checkpoints} if self._retention.sequences else {}
        return heldout_losses(by_step, lambda step: read_listing(by_step[step]))

    def _checksums(self, folder: Path) -> dict[str, str]:
        """Return the checksums of the files that this rank has written, which are still in memory."""
        return {name: checksum(folder / name) for name in self._own_files(folder)}

    def _own_files(self, folder: Path, besides: str | None = None) -> list[str]:
        """Return the names of the files of a checkpoint that this rank has written, without one of rank 0's."""
        names = [name for name in content_of(folder) if name != besides]
        return written_by(names, dist.get_rank(self._group), dist.get_world_size(self._group))

    def _on_all_ranks(self, what: str, action: Callable[[], _T], advice: str = _AFTER_FAILURE) -> list[_T]:
        """Run `action` on every rank and return all results; raise the errors of all, after `what` and with `advice`,
        on every rank."""
        result: _T | None = None
        failure: str | None = None
        try:
            result = action()
        except CheckpointException as error:
            failure = describe_failures(error)
        except (OSError, UserError) as error:
            failure = f"rank {dist.get_rank(self._group)}: {error}"
        outcomes: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(outcomes, (result, failure), group=self._group)
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            # Ranks that only waited for a failed one have an empty message.
            raise UserError(f"{what}: {'; '.join(dict.fromkeys(filter(None, failures)))}. {advice}")
        return [result for result, _ in outcomes]


def _uncopied(checkpoint: Path) -> str:
    return f"checkpoint {checkpoint} was not copied"


def new_stager() -> DefaultStager:
    """Make a stager: it copies on the caller's thread, into CPU memory that later saves reuse.

    That memory is page-locked for a GPU's copies, unless it would serve only once: to lock it takes about as long as to
    copy without.
    """
    pinned = torch.cuda.is_available() and not _STAGES_ONCE
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=pinned, use_non_blocking_copy=pinned, use_shared_memory=False, use_async_staging=False
        )
    )


def _remove(path: Path) -> None:
    """Rename a checkpoint and remove it, so that a crash in between leaves nothing that looks complete."""
    doomed = path.with_name(f"{path.name}.removed.partial")
    path.rename(doomed)
    shutil.rmtree(doomed)

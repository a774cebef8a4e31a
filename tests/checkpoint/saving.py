"""Checkpoints of a small tensor, saved and read by ranks, and writers that are stopped on the way."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from longctx.checkpoint.read import load_tensors
from longctx.checkpoint.retention import HeldOut, RetentionPolicy
from longctx.checkpoint.save import Checkpointer
from longctx.checkpoint.trainer_state import TrainerState
from longctx.errors import UserError

MODEL = {"dim": 16, "vocab_size": 320}


def state(step: int) -> TrainerState:
    return TrainerState(step, sequences=2 * step, tokens=128 * step, data="a corpus", model=MODEL)


def measured(step: int, loss: float) -> TrainerState:
    """The state of a checkpoint whose held-out loss is known."""
    return replace(state(step), heldout_loss=HeldOut(loss, 8))


def sharded(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """What an engine gives: 600 numbers that begin with `value`, divided over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"model": {"weight": distribute_tensor(torch.arange(600.0) + value, mesh, [Shard(0)])}}


def read_all(path: Path) -> float:
    """The value with which a checkpoint was saved, once all of it was read."""
    tensors = sharded(-1.0)
    load_tensors(path, tensors)
    read = tensors["model"]["weight"].full_tensor()
    assert torch.equal(read, torch.arange(600.0) + read[0])
    return read[0].item()


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    """On a rank: save `sharded(step)` for each step."""
    save_states(folder, RetentionPolicy(keep), *map(state, steps))


def save_states(folder: Path, retention: RetentionPolicy, *states: TrainerState) -> tuple[Path, float] | None:
    """On a rank: save `sharded(step)` with each state; the best checkpoint in the end."""
    checkpointer = Checkpointer(folder, retention, timeout=20.0)
    try:
        for each in states:
            checkpointer.save(sharded(each.step), each)
    finally:
        checkpointer.close()
    return checkpointer.best()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Stands for kill -9 at one point: every later change raises it too, so that what is there stays so."""


def stopped_before(point: int, action: Callable[[], object], changes: Sequence[tuple[object, str]]) -> bool:
    """Run `action`, and stop it before its change number `point`; whether it was stopped.

    changes: the functions that change something, each as an attribute of an object.
    """
    count = 0

    def counting(change):
        def changed(*arguments, **options):
            nonlocal count
            count += 1
            if count > point:
                raise Killed
            return change(*arguments, **options)

        return changed

    with ExitStack() as stack:
        for owner, name in changes:
            stack.enter_context(patch.object(owner, name, counting(getattr(owner, name))))
        try:
            action()
        except (Killed, UserError):  # UserError: torch gathers what ends a rank's writing and raises it as its own
            return True
    return False

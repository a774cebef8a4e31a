"""A tiny recipe with its corpus, and training it on ranks of the pool, where starting costs nothing."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from longctx import system as machine
from longctx.checkpoint.storage import Reader
from longctx.data.prepare import prepare
from longctx.engines.metrics import FILE_NAME, Metrics, read_metrics
from longctx.errors import UserError
from longctx.recipe import load
from longctx.train import trainer

RECIPE = """
name = "tiny"
seed = 3
[model]
layers = "LS"
depth = 2
dim = 16
lightning.heads = 2
softmax.heads = 2
softmax.kv_heads = 1
[data]
path = "corpus"
sequence_length = 64
[train]
steps = 8
sequences_per_step = 2
device = "cpu"
[optimizer]
lr = 3e-3
[schedule]
warmup = 2
[parallel]
cp = 2
timeout = "30s"
[checkpoint]
every = 2
keep = 4
[logging]
tensorboard = false
"""


def write_corpus(path: Path, *, heldout: float = 0.25, salt: int = 0) -> Path:
    """Prepare forty documents of 200 to 1000 bytes at `path`; another `salt` gives other texts."""
    texts = path.with_name(path.name + "-texts")
    texts.mkdir()
    for number in range(40):
        words = (f"{salt + (number * number + word) % 97:x}" for word in range(60 + 7 * number))
        (texts / f"{number:03}.txt").write_text(" ".join(words))
    prepare([texts], path, heldout=heldout, progress=False)
    return path


def write_workplace(folder: Path) -> Path:
    """Write `tiny.toml` and the `corpus` that it names into `folder`; returns the folder."""
    write_corpus(folder / "corpus")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


def train(
    workplace: Path,
    out: Path,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    draws: bool = False,
    only_stage: str | None = None,
) -> object:
    """On a rank: train `tiny.toml` of `workplace` into `out`, in the process group that the pool has made.

    `around`: what is entered meanwhile; what that gives is returned, or else the exit status.
    """
    overrides = [f"data.path={workplace / 'corpus'}", *overrides]
    return train_recipe(workplace / "tiny.toml", out, overrides, resume, around, draws, only_stage)


def train_recipe(
    source: Path | str,
    out: Path,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    draws: bool = False,
    only_stage: str | None = None,
) -> object:
    """The same of any recipe. `draws`: with the pictures at the end, a quarter of the time of a short run."""
    recipe = load(source, overrides)
    with (
        patch.object(trainer, "process_group", lambda kind, timeout: nullcontext()),
        patch.object(machine, "matmul_rate", lambda device, dtype: 1e9),
        nullcontext() if draws else patch.object(trainer.Reporter, "plot"),
        around() as entered,
    ):
        status = trainer.train(recipe, out=out, resume=resume, only_stage=only_stage)
    return entered if entered is not None else status


def mistake(
    workplace: Path,
    out: Path,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    only_rank: int | None = None,
) -> str:
    """On a rank: the message of the UserError that `train` has to end with.

    only_rank: the one that has the overrides.
    """
    if only_rank is not None and dist.get_rank() != only_rank:
        overrides = ()
    try:
        train(workplace, out, overrides, resume, around)
    except UserError as error:
        return str(error)
    raise AssertionError("it trained")


def metrics(out: Path) -> Metrics:
    """What the run in `out` measured."""
    return read_metrics(out / FILE_NAME)


def losses(out: Path) -> list[float]:
    """The loss of each step."""
    found = metrics(out).steps
    assert [step.step for step in found] == list(range(1, len(found) + 1))
    return [step.loss for step in found]


def checkpoints(out: Path) -> list[str]:
    """What lies in the run's folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, whole, by name: parameters and the optimizer's state."""
    reader = Reader(checkpoint)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)  # noqa: TID251 - by Reader
    return found


def interrupted_copy(run: Path, out: Path, step: int) -> Path:
    """A copy of the finished `run` as kill -9 leaves one whose newest checkpoint is of `step`; returns `out`."""
    shutil.copytree(run, out)
    for checkpoint in (out / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return out

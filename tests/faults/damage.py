"""Damaged files: a flipped bit in any file of a checkpoint or a corpus is noticed, or changes nothing."""

from pathlib import Path

from typer.testing import CliRunner

from longctx.launch.main import app
from tests.e2e.jobs import Job
from tests.faults.faults import OVERRIDES, Kind, Trial, expect, expect_plain, expect_same_run


def flip(trial: Trial, folder: Path) -> Path:
    """Flip a bit of a file under a folder, each file as likely as another; return the file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    file = trial.random.choice(files)
    content = bytearray(file.read_bytes())
    content[trial.random.randrange(len(content))] ^= 1 << trial.random.randrange(8)
    file.write_bytes(content)
    return file


def _flip_in_a_checkpoint(trial: Trial) -> None:
    """Resume from a checkpoint with a flipped bit."""
    folder = trial.shared.copy(trial.folder, run=True, steps=9)
    _resume(trial, folder, flip(trial, folder / "out" / "checkpoints" / "step-00000009"))


def _flip_in_the_corpus(trial: Trial) -> None:
    """Resume on a corpus with a flipped bit."""
    folder = trial.shared.copy(trial.folder, run=True, steps=9)
    _resume(trial, folder, flip(trial, folder / "corpus"))


def _resume(trial: Trial, folder: Path, file: Path) -> None:
    status, _, stderr = Job(folder, *OVERRIDES).wait()
    if status == 0:
        try:
            expect_same_run(folder / "out", trial.shared.whole)
        except AssertionError as error:
            raise AssertionError(f"a flipped bit in {file} was not noticed: {error}") from None
    else:
        expect_plain(status, stderr)


def _flip_and_verify(trial: Trial) -> None:
    """`checkpoint verify` of a run with a flipped bit in a checkpoint."""
    folder = trial.shared.copy(trial.folder, run=True)
    file = flip(trial, folder / "out" / "checkpoints")
    result = CliRunner().invoke(app, ["checkpoint", "verify", str(folder / "out")])
    expect(result.exit_code in (1, 2), f"a flipped bit in {file} was not noticed: {result.stdout}{result.stderr}")
    expect(isinstance(result.exception, SystemExit), f"{file}: {result.exception!r}")


KINDS = (
    Kind(
        "flip-checkpoint",
        "a flipped bit in any file of a checkpoint; resuming refuses it, or is bitwise equal",
        40,
        _flip_in_a_checkpoint,
    ),
    Kind(
        "flip-corpus",
        "a flipped bit in any file of a corpus; resuming refuses it, or is bitwise equal",
        40,
        _flip_in_the_corpus,
    ),
    Kind(
        "flip-verify",
        "a flipped bit in any file of a run's checkpoints; `checkpoint verify` names it",
        200,
        _flip_and_verify,
    ),
)

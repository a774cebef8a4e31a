"""Jobs after their submission: `longctx launch status`, `logs` and `cancel` of a name."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from longctx.checkpoint.read import list_checkpoints
from longctx.engines.metrics import FILE_NAME
from longctx.errors import UserError
from longctx.launch.cluster.executors import follower_of
from longctx.launch.cluster.job import CANCELLED, FOLDER, RECORD, Record, rank_log
from longctx.launch.terminal import echo


def read_record(name: str, directory: str | None = None) -> tuple[Path, Record]:
    """Return the run directory and the record of the job `name`: a directory, or the name of one in `runs`.

    Looked for are paths in the working directory, then in `directory`, that of a profile. Raises UserError if there is
    none.
    """
    bases = [Path(), *([] if directory is None else [Path(directory).expanduser()])]
    for folder in (base / place / name for base in bases for place in ("", "runs")):
        path = folder / FOLDER / RECORD
        if path.is_file():
            return folder, Record(**json.loads(path.read_text(encoding="utf-8")))
    where = " or ".join(str(base / "runs" / name / FOLDER / RECORD) for base in bases)
    elsewhere = "; --profile NAME looks in the directory of a profile too" if directory is None else ""
    raise UserError(f"{name}: no job was launched under this name: there is no {where}{elsewhere}")


def print_status(name: str, directory: str | None = None) -> int:
    """Print the state of a job and the progress of its runs; return the exit status."""
    folder, record = read_record(name, directory)
    sys.stdout.write(f"{follower_of(record).status(record)}\n")
    if record.is_examination:
        sys.stdout.write(f"{folder}: its table is in {rank_log(folder, 0)} when it has ended\n")
        return 0
    for run in _runs(folder):
        sys.stdout.write(f"{run}: {_progress(run)}\n")
    return 0


def _runs(folder: Path) -> list[Path]:
    """Return the run directories of a job: its own, or the numbered ones of a sweep."""
    numbered = [path.parent for path in folder.glob(f"[0-9]*/{FOLDER}")]
    return sorted(numbered, key=lambda path: int(path.name)) or [folder]


def _progress(run: Path) -> str:
    metrics = run / FILE_NAME
    if not metrics.is_file():
        return "no metrics here yet"
    steps = [line for line in metrics.read_text(encoding="utf-8").splitlines() if '"grad_norm"' in line]
    if not steps:
        return "before its first step"
    last = json.loads(steps[-1])
    checkpoints = list_checkpoints(run / "checkpoints")
    saved = f", latest checkpoint {checkpoints[-1].name}" if checkpoints else ""
    return f"step {last['step']}{_of(run)}, loss {last['loss']:.4f}, {last['tokens_per_second']:,.0f} tokens/s{saved}"


def _of(run: Path) -> str:
    """Return ` of N`, the steps of a run; empty before it has written its recipe."""
    recipe = run / "recipe.toml"
    return f" of {tomllib.loads(recipe.read_text(encoding='utf-8'))['train']['steps']}" if recipe.is_file() else ""


def print_logs(name: str, directory: str | None = None, *, rank: int, follow: bool) -> int:
    """Print the log of a rank (of its node, where the cluster keeps one per node); return the exit status.

    `follow`: wait for it, and print it as it grows. Raises UserError if there is none.
    """
    folder, record = read_record(name, directory)
    try:
        command = follower_of(record).log_command(record, folder, rank, follow=follow)
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 130


def cancel(name: str, directory: str | None = None, *, now: bool) -> int:
    """End a job after its ranks have saved, or `now`; return the exit status."""
    folder, record = read_record(name, directory)
    for run in _runs(folder):
        (run / FOLDER / CANCELLED).touch()
    echo(follower_of(record).cancel(record, now=now))
    return 0

"""Record of a run's starts, `run.json`: what produced these checkpoints.

One entry per start: commits, command line, machines, versions, recipe, corpus, parallel layout, and the step from which
it resumed. A fresh start begins the file anew, like `metrics.jsonl`: nothing of an attempt before it is left. No
environment variable gets in, and passwords in URLs are left out.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

import longctx
from longctx import system
from longctx.config import without_password
from longctx.data.blend import BlendedStream
from longctx.errors import UserError
from longctx.files import absolute, replace_file, writing
from longctx.recipe import Recipe, dump
from longctx.train.agreement import versions
from longctx.train.run_lock import this_process
from longctx.train.start import Start

FILE_NAME = "run.json"
_GIT_SECONDS = 20.0


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`."""

    starts: list[dict[str, Any]] = field(default_factory=list)
    """One entry per start, in order. Those of other versions of longctx may have other keys."""
    trackers: dict[str, str] = field(default_factory=dict)
    """The ids by which trackers continue the run, by the name of their table in `[logging]`."""


_RECORD = TypeAdapter(RunRecord)


def read_record(out: Path) -> RunRecord:
    """Return the record in a run's directory; an empty one if there is none.

    Raises UserError for anything else under its name. The file is written as a whole, so a crash does not damage it:
    what cannot be read is not the run's, and is not overwritten.
    """
    path = out / FILE_NAME
    try:
        return _RECORD.validate_json(path.read_bytes(), strict=True, extra="forbid")
    except FileNotFoundError:
        return RunRecord()
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise UserError(
            f"{path} is not the record of a run: {reason}. Move it away, or choose another directory with --out"
        ) from error


def add_start(out: Path, record: RunRecord, entry: Mapping[str, Any], trackers: Mapping[str, str]) -> None:
    """Write a record with one more start; one that resumes from step 0 is the first. Raises UserError if it cannot.

    The resolved recipe stays only in the first of consecutive entries that have the same one.
    """
    earlier = record.starts if entry["resumed_from"] is not None else []
    recipe = dict(entry["recipe"])
    if earlier and earlier[-1].get("recipe", {}).get("sha256") == recipe["sha256"]:
        del recipe["resolved"]
    content = RunRecord([*earlier, {**entry, "recipe": recipe}], dict(trackers))
    with writing(out / FILE_NAME):
        replace_file(out / FILE_NAME, (json.dumps(asdict(content), indent=1) + "\n").encode())


def describe_start(
    recipe: Recipe, out: Path, start: Start, device: torch.device, axes: Mapping[str, int], command: Sequence[str]
) -> dict[str, Any]:
    """Return the entry of this start, on rank 0; nothing on other ranks. Collective.

    `axes`: the size of each mesh axis. `command`: what the user has started, as arguments.
    """
    each: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(each, (socket.gethostname(), system.device_name(device)))
    if dist.get_rank() != 0:
        return {}
    text = dump(recipe)
    process = this_process()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(map(without_password, command)),
        "directory": os.getcwd(),
        "git": git_state(Path.cwd()),
        "longctx": {"version": longctx.__version__, "git": _own_git_state()},
        "user": process.user,
        "jobs": list(process.restarts),
        "hosts": _by_host(each),
        "system": platform.platform(),
        "versions": {name: value for name, value in versions().items() if value is not None},
        "recipe": {
            "path": str(absolute(out / "recipe.toml")),
            "sha256": sha256(text.encode()).hexdigest(),
            "resolved": _without_passwords(recipe.model_dump(mode="json", exclude_none=True)),
        },
        "stage": start.stage.name,
        "corpus": _describe_corpora(start.stage.recipe, start.data.stream),
        "parallel": {"ranks": len(each), **axes, "layout": start.stage.recipe.parallel.layout},
        "resumed_from": None if start.source is None else {"checkpoint": str(start.source), "step": start.state.step},
        "initialised_from": None if start.weights is None else str(start.weights.path),
    }


def _describe_corpora(recipe: Recipe, stream: BlendedStream) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the entry of the corpus, or of a mix one entry per source, with its share of the training tokens."""
    entries = []
    for source in stream.sources:
        config, documents = source.config, source.stream.documents
        manifest = documents.corpus.manifest
        entry: dict[str, Any] = {
            "path": str(absolute(config.path)),
            "fingerprint": manifest.fingerprint("train"),
            "heldout": None if recipe.evaluation is None else manifest.fingerprint("heldout"),
        }
        if recipe.data.mix:
            entry |= {"share": source.share, "documents": len(documents), "tokens": documents.tokens}
            entry |= {"min_document": config.min_document, "max_document": config.max_document}
        entries.append(entry)
    return entries if recipe.data.mix else entries[0]


def _by_host(each: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return, for each host, its ranks and the names of their devices, each name once."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (host, device) in enumerate(each):
        entry = hosts.setdefault(host, {"host": host, "ranks": [], "devices": []})
        entry["ranks"].append(rank)
        if device not in entry["devices"]:
            entry["devices"].append(device)
    return list(hosts.values())


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that is checked out in a folder, and whether tracked files differ from it (`dirty`).

    None if it is not in a repository, has no commit, or git is missing, refuses or takes too long.
    """
    # Neither writes the index, which may be another user's, nor starts a monitor that the repository names.
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder), *describe]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    commit, dash, _ = found.stdout.strip().partition("-dirty")
    return {"commit": commit, "dirty": bool(dash)} if found.returncode == 0 and commit else None


def _own_git_state() -> dict[str, Any] | None:
    """Return the state of the checkout that longctx is imported from; None if it is installed."""
    root = Path(longctx.__file__).resolve().parent.parent
    # An installed package may be inside the repository of something else, in its environment.
    return git_state(root) if (root / ".git").exists() else None


def _without_passwords(value: Any) -> Any:
    match value:
        case str():
            return without_password(value)
        case dict():
            return {key: _without_passwords(item) for key, item in value.items()}
        case list():
            return [_without_passwords(item) for item in value]
    return value

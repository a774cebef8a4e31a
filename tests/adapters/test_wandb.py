"""Weights & Biases offline, by its own library: what its files hold after training, resuming, and its end."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest

pytest.importorskip("wandb", reason="needs the extra: pip install -e '.[wandb]'")

from wandb.proto import wandb_internal_pb2

from longctx.recipe.tables import WandbConfig
from longctx.tracking.wandb import WandbTracker
from longctx.train.run_record import read_record
from tests.tracking.records import point, tracked
from tests.train.runs import checkpoints, interrupted_copy, metrics, train, write_workplace

OFFLINE = ["logging.wandb.mode=offline", "logging.wandb.project=p", "parallel.timeout=240s"]


_BLOCK, _HEADER = 32768, 7


def entries(file: Path) -> Iterator[bytes]:
    """The entries of a `.wandb` file: LevelDB's log, whose first block begins with a header of wandb's."""
    content, place, entry = file.read_bytes(), _HEADER, b""
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, place)
        entry += content[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def stored(out: Path) -> list[list[Any]]:
    """The records of each of wandb's offline runs in a directory, oldest first."""
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    return [[wandb_internal_pb2.Record.FromString(entry) for entry in entries(file)] for file in files]


def history(records: list[Any]) -> list[dict[str, float]]:
    """What was logged, in order."""
    logged = [record.history.item for record in records if record.HasField("history")]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items} for items in logged]


def steps(records: list[Any]) -> list[int]:
    return [int(row["step"]) for row in history(records) if "train/loss" in row]


def test_a_run_that_resumes_is_one_run_with_all_its_steps(ranks, tmp_path) -> None:
    workplace = write_workplace(tmp_path)
    ranks.run(train, workplace, tmp_path / "whole", [*OFFLINE, "evaluation.every=4"], size=2)
    out = interrupted_copy(tmp_path / "whole", tmp_path / "out", step=4)
    ranks.run(train, workplace, out, [*OFFLINE, "evaluation.every=4"], size=2)
    first, second = stored(out)
    assert (steps(first), steps(second)) == ([1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8])
    run_ids = {record.run.run_id for records in (first, second) for record in records if record.HasField("run")}
    assert run_ids == {read_record(out).trackers["wandb"]}
    losses = [row["train/loss"] for row in history(second) if "train/loss" in row]
    assert losses == [metric.loss for metric in metrics(out).steps[4:]]
    assert [row["heldout/loss"] for row in history(first) if "heldout/loss" in row] == [
        evaluation.loss for evaluation in metrics(tmp_path / "whole").evaluations
    ]


def config(records: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records:
        for change in (record.config, record.run.config):
            found |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in change.update}
    return found


def test_the_recipe_and_the_axis_of_steps_are_stored(tmp_path) -> None:
    tracker = WandbTracker(WandbConfig(mode="offline", tags=("a",), group="g"), tracked(tmp_path))
    tracker.write([point(2), point(1)])
    tracker.close("stopped")
    (records,) = stored(tmp_path)
    assert config(records)["optimizer"] == {"lr": 0.1}
    (run,) = (record.run for record in records if record.HasField("run"))
    assert (run.display_name, run.run_group, list(run.tags)) == ("tiny", "g", ["a"])
    assert [row["step"] for row in history(records)] == [2, 1]
    defined = {record.metric.glob_name or record.metric.name: record.metric for record in records}
    assert defined["*"].step_metric == "step"
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [1]
    assert any(record.HasField("preempting") for record in records)


def test_secrets_of_the_environment_are_in_no_file_of_the_run(ranks, tmp_path) -> None:
    workplace, key = write_workplace(tmp_path), "0123456789abcdef" * 2 + "hunter22"
    ranks.run(with_key, key, workplace, tmp_path / "out", [*OFFLINE, "train.steps=2"], size=1)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and not file.is_symlink()]
    assert any(file.suffix == ".wandb" for file in files)
    assert [file for file in files if key.encode() in file.read_bytes()] == []


def with_key(key: str, *arguments: Any) -> object:
    """On a rank: train with a key of Weights & Biases in the environment."""
    with patch.dict(os.environ, {"WANDB_API_KEY": key}):
        return train(arguments[0], arguments[1], [*arguments[2], "parallel.cp=1"])


def killing_at_the_third(killed: list[int]) -> Any:
    """Kill wandb's process at the third step, and note it in `killed`."""
    write = WandbTracker.write

    def killing(self: WandbTracker, points: Any) -> None:
        if not killed and points[-1].step >= 3:
            for child in psutil.Process().children(recursive=True):
                if "wandb" in " ".join(child.cmdline()):
                    killed.append(child.pid)
                    child.send_signal(signal.SIGKILL)
                    child.wait(10)
        write(self, points)

    return patch.object(WandbTracker, "write", killing)


def train_while_wandb_dies(workplace: Path, out: Path) -> tuple[list[int], list[str]]:
    """On a rank: train; return the processes that were killed, and the messages."""
    from longctx.train import trainer

    killed: list[int] = []
    told: list[str] = []
    message = trainer.Reporter.message

    def kept(self: Any, text: str) -> None:
        told.append(text)
        message(self, text)

    with killing_at_the_third(killed), patch.object(trainer.Reporter, "message", kept):
        assert train(workplace, out, [*OFFLINE, "parallel.cp=1"]) == 0
    return killed, told


def test_training_survives_the_end_of_wandbs_process(ranks, tmp_path) -> None:
    workplace = write_workplace(tmp_path)
    ((killed, told),) = ranks.run(train_while_wandb_dies, workplace, tmp_path / "out", size=1)
    assert killed
    assert [metric.step for metric in metrics(tmp_path / "out").steps] == list(range(1, 9))
    assert checkpoints(tmp_path / "out")[-1] == "step-00000008"
    warnings = [text for text in told if text.startswith("WARNING")]
    assert [text.split(": ")[1].split(" ")[0] for text in warnings[:1]] == ["Weights"]
    assert "Weights & Biases failed" in warnings[0]
    assert len(warnings) <= 2, "one for the failure, one for what is missing"


def test_without_a_login_there_is_an_error_and_no_question(tmp_path) -> None:
    program = f"""
from pathlib import Path
from longctx.recipe.tables import WandbConfig
from longctx.tracking.base import TrackedRun
from longctx.tracking.wandb import WandbTracker
WandbTracker(WandbConfig(mode="online"), TrackedRun("tiny", {{}}, Path({str(tmp_path)!r}), 0, None))
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "UserError: logging.wandb: nobody is logged in to Weights & Biases" in ended.stderr

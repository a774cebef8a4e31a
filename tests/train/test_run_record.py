"""run.json: what produced a checkpoint, one entry per start, and no secrets."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longctx.data.blend import train_stream
from longctx.data.manifest import Manifest
from longctx.errors import UserError
from longctx.recipe import load
from longctx.train import run_record
from longctx.train.run_record import RunRecord, add_start, describe_start, git_state, read_record
from tests.data.cases import corpus_of
from tests.train.runs import RECIPE

AXES = {"dp_shard": 1, "cp": 2}


def entry(step: int | None = None, digest: str = "a") -> dict[str, Any]:
    resumed = None if step is None else {"checkpoint": "there", "step": step}
    return {"command": f"from {step}", "recipe": {"sha256": digest, "resolved": {"seed": 3}}, "resumed_from": resumed}


def add(out: Path, start: dict[str, Any], **trackers: str) -> RunRecord:
    add_start(out, read_record(out), start, trackers)
    return read_record(out)


# The file


def test_a_start_that_resumes_is_one_more_entry(tmp_path) -> None:
    assert read_record(tmp_path) == RunRecord()
    add(tmp_path, entry(), wandb="id")
    found = add(tmp_path, entry(10), wandb="id", mlflow="other")
    assert [start["command"] for start in found.starts] == ["from None", "from 10"]
    assert found.trackers == {"wandb": "id", "mlflow": "other"}


def test_a_fresh_start_begins_anew(tmp_path) -> None:
    for start in (entry(), entry(10), entry()):
        found = add(tmp_path, start)
    assert [start["command"] for start in found.starts] == ["from None"]


def test_the_first_start_here_may_resume_from_elsewhere(tmp_path) -> None:
    assert [start["command"] for start in add(tmp_path, entry(10)).starts] == ["from 10"]


def test_a_recipe_is_written_once_until_it_changes(tmp_path) -> None:
    for start in (entry(), entry(10), entry(20, "b"), entry(30, "b"), entry(40, "a")):
        found = add(tmp_path, start)
    assert ["resolved" in start["recipe"] for start in found.starts] == [True, False, True, False, True]


def test_keys_of_another_version_stay(tmp_path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"of": "another version"}], "trackers": {}}))
    assert add(tmp_path, entry(10)).starts[0] == {"of": "another version"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": "5f"}', '{"starts": 1, "trackers": {}}', '{"starts": [1]}'])
def test_what_is_no_record_is_named_and_left_alone(tmp_path, text) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is not the record of a run: .*\. Move it away, or choose another"):
        read_record(tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_a_folder_under_its_name_is_named(tmp_path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match=r"run\.json is not the record of a run: Is a directory\."):
        read_record(tmp_path)


def test_a_full_disk_leaves_the_record_before(tmp_path, monkeypatch) -> None:
    before = add(tmp_path, entry())

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(UserError, match=r"run\.json cannot be written: No space left on device"):
            add_start(tmp_path, before, entry(10), {})
    assert read_record(tmp_path) == before


# What it says


def described(
    folder: Path, source: Path | None, secrets: dict[str, str], overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """On a rank: the entry of a start in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in secrets.items():
            patch.setenv(name, value)
        recipe = load("tiny.toml", ["checkpoint.copy_to=s3://me:hunter2@bucket/x", *overrides])
        start: Any = SimpleNamespace(
            stage=recipe.find_stage(),
            data=SimpleNamespace(stream=train_stream(recipe.data, seed=1)),
            source=source,
            weights=None,
            state=SimpleNamespace(step=10),
        )
        command = ["longctx", "train", "a b.toml", "checkpoint.copy_to=s3://me:hunter2@bucket/x"]
        return describe_start(recipe, Path("runs/a"), start, torch.device("cpu"), AXES, command)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    corpus_of(tmp_path / "corpus", [100, 20, 30])
    return tmp_path


def test_an_entry_says_what_a_person_asks(ranks, folder) -> None:
    found, other = ranks.run(described, folder, Path("there/step-00000010"), {}, size=2)
    assert other == {}, "rank 0 writes"
    assert found["command"] == "longctx train 'a b.toml' 'checkpoint.copy_to=s3://***@bucket/x'"
    assert found["directory"] == str(folder)
    assert found["resumed_from"] == {"checkpoint": "there/step-00000010", "step": 10}
    assert found["recipe"]["path"] == str(folder / "runs/a/recipe.toml")
    assert found["recipe"]["resolved"]["optimizer"]["lr"] == 3e-3
    fingerprint = Manifest.read(folder / "corpus").fingerprint("train")
    assert found["corpus"] == {"path": str(folder / "corpus"), "fingerprint": fingerprint, "heldout": None}
    assert found["parallel"] == {"ranks": 2, "dp_shard": 1, "cp": 2, "layout": "zigzag"}
    assert [host["ranks"] for host in found["hosts"]] == [[0, 1]]
    assert len(found["hosts"][0]["devices"]) == 1, "each name once"
    assert found["versions"]["torch"] == torch.__version__
    assert found["longctx"]["version"] == found["versions"]["longctx"]
    json.dumps(found)


def test_an_entry_has_each_source_of_a_mix(ranks, folder) -> None:
    mix = 'data.mix=[{path="corpus",weight=3,min_document=50},{path="corpus",weight=1}]'
    (found,) = ranks.run(described, folder, None, {}, (mix, "evaluation.every=2"), size=1)
    manifest = Manifest.read(folder / "corpus")
    corpus = {"path": str(folder / "corpus"), "fingerprint": manifest.fingerprint("train")}
    corpus["heldout"] = manifest.fingerprint("heldout")
    assert found["corpus"] == [
        corpus | {"share": 0.75, "documents": 1, "tokens": 100, "min_document": 50, "max_document": None},
        corpus | {"share": 0.25, "documents": 3, "tokens": 150, "min_document": 1, "max_document": None},
    ]


def test_an_entry_has_no_secrets(ranks, folder) -> None:
    names = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    (found,) = ranks.run(described, folder, None, dict.fromkeys(names, "hunter2"), size=1)
    assert found["resumed_from"] is None
    assert "hunter2" not in json.dumps(found)


# git


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *own, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_is_recorded_and_whether_files_differ_from_it(tmp_path) -> None:
    assert git_state(tmp_path) is None, "no repository"
    git(tmp_path, "init")
    assert git_state(tmp_path) is None, "no commit"
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    git(tmp_path, "tag", "v1-dirty")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "untracked").write_text("")
    assert git_state(tmp_path / "runs") == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_git_is_not_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_a_repository_around_an_installed_longctx_is_not_its_own(tmp_path, monkeypatch) -> None:
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "a")
    monkeypatch.setattr(run_record.longctx, "__file__", str(tmp_path / "venv/longctx/__init__.py"))
    assert run_record._own_git_state() is None
    monkeypatch.setattr(run_record.longctx, "__file__", str(tmp_path / "longctx/__init__.py"))
    assert run_record._own_git_state() == git_state(tmp_path)

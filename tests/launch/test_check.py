"""`longctx train --check`: what would run, or why it would not; nothing is started, and nothing written."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from longctx.checkpoint.copies import CheckpointCopies
from longctx.data.corpus import Corpus
from longctx.launch import train as training
from longctx.train.run_lock import FILE_NAME, this_process
from tests.launch.test_main import run
from tests.train.runs import metrics, train, write_workplace

ORDER = "Recipe, data and start are in order; nothing was started.\n"


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> Path:
    """A workplace with a run of 4 steps in `out`, whose checkpoints 2 and 4 are in `store` too."""
    place = write_workplace(tmp_path_factory.mktemp("workplace"))
    overrides = ("parallel.cp=1", "train.steps=4", f"checkpoint.copy_to=file://{place / 'store'}")
    ranks.run(train, place, place / "out", overrides, size=1)
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """A copy of the workplace, in which commands run; ranks that start fail the test."""
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "place"))
    monkeypatch.setattr(training, "run_ranks", None)
    return tmp_path / "place"


def check(*arguments: str) -> tuple[int, str]:
    """Exit status and output of a check, which leaves every file as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    found = run("train", "tiny.toml", "--check", *arguments)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return found


def rows(*arguments: str) -> dict[str, str]:
    status, text = check(*arguments)
    assert status == 0, text
    assert text.endswith(ORDER)
    return {line[:10].strip(): line[10:] for line in text.removesuffix(ORDER).splitlines()}


def test_what_would_run(place):
    found = rows("--nproc", "4", "train.sequences_per_step=4", "data.sequence_length=1Ki", "train.steps=1000")
    *names, warning = found
    assert names == ["run", "start", "model", "ranks", "sequence", "step", "steps", "corpus"]
    assert warning == "corpus is", "read more than 4 times"
    assert found["run"] == "tiny, in runs/tiny"
    assert found["start"] == "step 0, random parameters of seed 3"
    (trained,) = metrics(place / "out").runs
    assert found["model"] == f"13.4k parameters ({trained.parameters:,}), LS, dim 16, vocabulary 320, fp32"
    assert found["ranks"] == "4 ranks (cp 2, dp_shard 2), engine torch"
    assert found["sequence"] == "1Ki tokens, 512 per rank (zigzag)"
    assert found["step"] == "4Ki tokens: 4 sequences, 2 per data-parallel rank"
    tokens = json.loads((place / "corpus/manifest.json").read_text())["splits"]["train"]["tokens"]
    assert found["steps"] == f"1,000: 4.1M tokens, {1000 * 4096 / tokens:,.0f} epochs"
    assert found["corpus"].endswith("k tokens in 28 documents")


def test_a_mix_has_a_row_per_source_and_repetition_is_warned_of(place):
    mix = 'data.mix=[{path="corpus",weight=3,max_document=500},{path="corpus",weight=1,min_document=501}]'
    status, text = check("evaluation.every=4", "evaluation.sequences=3", "train.steps=1000", mix)
    lines = {line[:10].strip() or line[10:20]: line[10:] for line in text.splitlines()}
    assert status == 0
    assert lines["steps"] == "1,000: 128k tokens"
    documents = Corpus("corpus").lengths
    short, long = documents[documents <= 500], documents[documents > 500]
    assert lines["corpora"] == (
        f"75.0% of tokens, {96_000 / short.sum():.2f} epochs: corpus (documents of at most 500 tokens), "
        f"{short.sum() / 1000:.1f}k tokens in {len(short)} documents"
    )
    assert f"25.0% of tokens, {32_000 / long.sum():.2f} epochs: corpus (documents of at least 501 tokens), " in text
    assert "          3 held-out sequences in the same shares\n" in text
    assert f"500 tokens) is read {96_000 / short.sum():.1f} times in 2,000 sequences: beyond about 4 epochs" in text


def test_what_it_would_start_from(place):
    assert rows("--out", "out")["start"] == "resumes from out/checkpoints/step-00000004, after step 4 of 8"
    assert rows("--out", "new", "train.init=out")["start"] == (
        "step 0, with the weights of out/checkpoints/step-00000004"
    )
    done = rows("--out", "out", "train.steps=3")["start"]
    assert done == "nothing to do: out/checkpoints/step-00000004 is at step 4, train.steps is 3"
    earlier = rows("--out", "elsewhere", "--resume", "out/checkpoints/step-00000002")["start"]
    assert earlier == "resumes from out/checkpoints/step-00000002, after step 2 of 8"


def test_a_copy_that_it_would_download_is_named_and_not_claimed(place):
    url = f"file://{place / 'store'}"
    owner = CheckpointCopies(url).owner()
    found = rows("--out", "lost", f"checkpoint.copy_to={url}")["start"]
    assert found == f"resumes from {url}/step-00000004, which is downloaded and checked then"
    assert CheckpointCopies(url).owner() == owner
    status, told = check("--out", "lost", "--resume", "never", f"checkpoint.copy_to={url}")
    assert (status, "has copies of an earlier run's checkpoints" in told) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc", "3"], "start a multiple of 2 (--nproc 2 on one machine)"),
        (["train.stps=3"], "train.stps: unknown key"),
        (["data.path=gone"], "gone does not exist"),
        (["evaluation.every=2", "evaluation.sequences=0"], "evaluation.sequences"),
        (["--out", "out", "model.dim=32"], "of another model: dim: 16, expected 32"),
        (["--out", "new", "train.init=out", "model.dim=32"], "has the weights of another model: dim: 16, expected 32"),
        (["--out", "out", "--resume", "never"], "contains checkpoints of an earlier run"),
        (["--out", "tiny.toml/out"], "tiny.toml is not a directory; choose another --out"),
    ],
)
def test_what_cannot_run_is_status_2(place, arguments, words):
    status, told = check(*arguments)
    assert (status, words in told) == (2, True), told


def test_a_damaged_checkpoint_and_a_run_in_progress_are_found(place):
    shard = next((place / "out/checkpoints/step-00000004").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    assert "step-00000004 is damaged" in check("--out", "out")[1]
    assert rows("--out", "out", "checkpoint.verify=sizes")["start"].startswith("resumes")
    (place / "out" / FILE_NAME).write_text(json.dumps(asdict(this_process())))
    status, told = check("--out", "out", "checkpoint.verify=sizes")
    assert (status, "out is being trained into by process" in told) == (2, True)


def test_of_a_job_rank_0_prints(place, monkeypatch):
    job = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert check("parallel.cp=4") == (0, "")
    monkeypatch.setenv("RANK", "0")
    assert "4 ranks (cp 4), engine torch" in check("parallel.cp=4")[1]


def test_notes_of_the_recipe_are_said(place):
    status, text = check("checkpoint.every=3", "evaluation.every=5")
    assert status == 0
    assert "checkpoint.keep_best: no checkpoint before the last one" in text
